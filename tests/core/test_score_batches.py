"""The token-budget batcher against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_chunks import chunk

from opd_async.scheduling.score_batches import MAX_CONTEXT_TOKENS, MAX_SAMPLES, ScoreItem, TokenBudgetBatcher


def shown(batch: list[ScoreItem]) -> list[tuple[int, list[tuple[int, int]]]]:
    return [(item.sample_id, [(one.start, one.end) for one in item.chunks]) for item in batch]


def test_a_full_batch_leaves_at_once() -> None:
    batcher = TokenBudgetBatcher(6, 1.0)
    batcher.add(chunk(1, 0, 3), 0.0)
    assert batcher.take(0.0) == []
    batcher.add(chunk(2, 0, 3), 0.0)
    assert shown(batcher.take(0.0)) == [(1, [(0, 3)]), (2, [(0, 3)])]
    assert batcher.take(9.0) == []


def test_an_overdue_chunk_leaves_with_what_is_there() -> None:
    batcher = TokenBudgetBatcher(100, 1.0)
    batcher.add(chunk(1, 0, 3), 5.0)
    batcher.add(chunk(2, 0, 3), 5.9)
    assert batcher.due_at() == 6.0
    assert batcher.take(5.99) == []
    assert [item.sample_id for item in batcher.take(6.0)] == [1, 2]
    assert batcher.due_at() is None


def test_all_waiting_chunks_of_a_sample_travel_together() -> None:
    batcher = TokenBudgetBatcher(4, 1.0)
    for start in (0, 2, 4):
        batcher.add(chunk(1, start, start + 2), 0.0)
    batcher.add(chunk(2, 0, 2), 0.0)
    assert shown(batcher.take(0.0)) == [(1, [(0, 2), (2, 4), (4, 6)])]
    assert batcher.waiting_tokens == 2


def test_a_sample_is_in_one_batch_at_a_time() -> None:
    batcher = TokenBudgetBatcher(2, 1.0)
    batcher.add(chunk(1, 0, 2), 0.0)
    assert len(batcher.take(0.0)) == 1
    batcher.add(chunk(1, 2, 6), 0.0)
    assert batcher.take(9.0) == []
    assert batcher.due_at() is None
    batcher.add(chunk(2, 0, 1), 0.5)
    assert batcher.due_at() == 1.5
    batcher.done([1])
    assert batcher.due_at() == 1.0
    assert shown(batcher.take(0.5)) == [(1, [(2, 6)])]


def test_an_end_without_tokens_leaves_when_it_is_due() -> None:
    batcher = TokenBudgetBatcher(4, 1.0)
    batcher.add(chunk(1, 3, 3, finish="stop"), 0.0)
    assert batcher.take(0.9) == []
    (item,) = batcher.take(1.0)
    assert item.new_tokens == 0


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_dropped_sample_does_not_count(in_flight: bool) -> None:
    batcher = TokenBudgetBatcher(4, 1.0)
    if in_flight:
        batcher.add(chunk(1, 0, 4), 0.0)
        batcher.take(0.0)
    batcher.add(chunk(1, 4, 7), 0.0)
    batcher.drop(1)
    batcher.drop(1)
    batcher.done([1])
    assert batcher.waiting_tokens == 0
    batcher.add(chunk(2, 0, 2), 0.0)
    assert batcher.take(0.0) == []


def test_chunks_that_come_back_take_their_place() -> None:
    batcher = TokenBudgetBatcher(100, 1.0)
    for start, end in ((8, 12), (0, 4), (12, 12), (4, 8), (0, 4)):
        batcher.add(chunk(1, start, end), 0.0)
    assert shown(batcher.take(1.0)) == [(1, [(0, 4), (0, 4), (4, 8), (8, 12), (12, 12)])]


def test_what_waits_can_be_taken_away() -> None:
    batcher = TokenBudgetBatcher(4, 1.0)
    batcher.add(chunk(1, 0, 4), 0.0)
    batcher.take(0.0)
    for sample_id, start in ((1, 4), (2, 0), (1, 6)):
        batcher.add(chunk(sample_id, start, start + 2), 0.0)
    taken = batcher.take_all()
    assert [(one.sample_id, one.start) for one in taken] == [(1, 4), (1, 6), (2, 0)]
    assert batcher.waiting_tokens == 0 and batcher.due_at() is None
    for one in taken:
        batcher.add(one, 0.0)
    batcher.done([1])
    assert shown(batcher.take(0.0)) == [(1, [(4, 6), (6, 8)])], "the first to leave, as it was the first to come"


def test_what_ended_leaves_first_and_then_what_is_oldest() -> None:
    batcher = TokenBudgetBatcher(4, 1.0)
    batcher.add(chunk(1, 0, 4, weight_version=2), 0.0)
    batcher.add(chunk(2, 0, 4, weight_version=1), 0.0)
    batcher.add(chunk(3, 0, 4, weight_version=2, finish="stop"), 0.0)
    assert [batcher.take(0.0)[0].sample_id for _ in range(3)] == [3, 2, 1]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.sampled_from("aaatdxw"), st.integers(0, 3), st.integers(0, 4)), max_size=60),
)
def test_behaves_like_the_model(batch_tokens: int, moves: list[tuple[str, int, int]]) -> None:
    batcher = TokenBudgetBatcher(batch_tokens, 2.0)
    now = 0.0
    ends: dict[int, int] = {}
    waiting: dict[int, tuple[float, int]] = {}
    in_flight: list[list[int]] = []
    for move, sample_id, number in moves:
        if move == "a":
            start = ends.get(sample_id, 0)
            ends[sample_id] = start + number
            batcher.add(chunk(sample_id, start, start + number), now)
            arrived, tokens = waiting.get(sample_id, (now, 0))
            waiting[sample_id] = (arrived, tokens + number)
        elif move == "w":
            now += number
        elif move == "d" and in_flight:
            batcher.done(in_flight.pop(number % len(in_flight)))
        elif move == "x":
            batcher.drop(sample_id)
            waiting.pop(sample_id, None)
        elif move == "t":
            away = {one for batch in in_flight for one in batch}
            free = {one: entry for one, entry in waiting.items() if one not in away}
            batch = batcher.take(now)
            is_full = sum(tokens for _, tokens in free.values()) >= batch_tokens
            is_due = any(now >= arrived + 2.0 for arrived, _ in free.values())
            assert bool(batch) == (bool(free) and (is_full or is_due))
            assert [item.sample_id for item in batch] == list(free)[: len(batch)], "oldest first"
            assert len(batch) <= 1 or sum(item.new_tokens for item in batch) <= batch_tokens
            for item in batch:
                assert item.new_tokens == waiting.pop(item.sample_id)[1]
                assert all(a.end == b.start for a, b in zip(item.chunks, item.chunks[1:], strict=False))
            if batch:
                in_flight.append([item.sample_id for item in batch])
        assert batcher.waiting_tokens == sum(tokens for _, tokens in waiting.values())


def test_a_batch_is_no_larger_than_an_engine_takes() -> None:
    many = TokenBudgetBatcher(10 * MAX_SAMPLES, 1.0)
    for sample_id in range(MAX_SAMPLES + 1):
        many.add(chunk(sample_id, 0, 1), 0.0)
    assert [len(many.take(9.0)), len(many.take(9.0))] == [MAX_SAMPLES, 1]
    long = TokenBudgetBatcher(100, 1.0)
    for sample_id in range(3):
        long.add(chunk(sample_id, 0, 1, prompt_tokens=MAX_CONTEXT_TOKENS // 2 - 1), 0.0)
    assert [len(long.take(9.0)), len(long.take(9.0))] == [2, 1]
    assert (long.waiting_tokens, long.take(9.0)) == (0, [])
