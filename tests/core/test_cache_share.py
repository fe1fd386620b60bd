"""Coarse scoring: tokens leave once, in order and in time; prefixes are computed a bounded number of times."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_chunks import chunk

from opd_async.scheduling.cache_share import SENTINEL_EVERY, CacheShare, CutPoints, next_cut
from opd_async.transport.messages import Chunk

SENTINEL = 3 * SENTINEL_EVERY


def spans(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(one.sample_id, one.start, one.end) for one in chunks]


@pytest.mark.parametrize(("position", "cut"), [(0, 4), (3, 4), (4, 8), (7, 8), (8, 16), (100, 128)])
def test_cut_points_double(position: int, cut: int) -> None:
    assert next_cut(position, 4) == cut


def test_nothing_waits_while_the_cache_holds() -> None:
    points = CutPoints(4, 1)
    assert spans(points.offer(chunk(1, 0, 2), coarse=False)) == [(1, 0, 2)]
    assert points.waiting_tokens == 0


def test_chunks_wait_for_the_end_of_their_response() -> None:
    points = CutPoints(4, 1)
    assert points.offer(chunk(1, 0, 30), coarse=True) == []
    assert points.offer(chunk(2, 0, 2), coarse=True) == []
    assert points.waiting_tokens == 32
    assert spans(points.offer(chunk(1, 30, 30, finish="stop"), coarse=True)) == [(1, 0, 30), (1, 30, 30)]
    assert spans(points.offer(chunk(2, 2, 3), coarse=False)) == [(2, 0, 2), (2, 2, 3)]
    assert points.waiting_tokens == 0


def test_a_sentinel_leaves_at_its_cut_points() -> None:
    points = CutPoints(4, 1)
    assert points.offer(chunk(SENTINEL, 0, 3), coarse=True) == []
    assert spans(points.offer(chunk(SENTINEL, 3, 5), coarse=True)) == [(SENTINEL, 0, 3), (SENTINEL, 3, 5)]
    assert points.offer(chunk(SENTINEL, 5, 7), coarse=True) == []
    assert spans(points.offer(chunk(SENTINEL, 7, 8), coarse=True)) == [(SENTINEL, 5, 7), (SENTINEL, 7, 8)]


def test_some_of_any_few_samples_in_a_row_are_sentinels() -> None:
    for first in range(3 * SENTINEL_EVERY):
        points = CutPoints(4, None)
        left = [points.offer(chunk(first + index, 0, 4), coarse=True) for index in range(SENTINEL_EVERY)]
        assert sum(map(bool, left)) == 1


@pytest.mark.parametrize(("max_staleness", "patience"), [(1, 1), (2, 1), (3, 2), (8, 7)])
def test_tokens_leave_a_step_before_they_are_needed(max_staleness: int, patience: int) -> None:
    points = CutPoints(100, max_staleness)
    points.offer(chunk(1, 0, 2, weight_version=3), coarse=True)
    points.offer(chunk(2, 0, 2, weight_version=4), coarse=True)
    assert points.advance(3 + patience - 1) == []
    assert spans(points.advance(3 + patience)) == [(1, 0, 2)]
    # chunks may overtake the news of a version
    newer = chunk(2, 2, 3, weight_version=4 + patience)
    assert spans(points.offer(newer, coarse=True)) == [(2, 0, 2), (2, 2, 3)]


def test_strictly_on_policy_nothing_waits() -> None:
    assert spans(CutPoints(100, 0).offer(chunk(1, 0, 2, weight_version=7), coarse=True)) == [(1, 0, 2)]


def test_whole_responses_wait_for_their_end_alone() -> None:
    points = CutPoints(100, None)
    points.offer(chunk(1, 0, 2), coarse=True)
    assert points.advance(50) == []
    points.drop(1)
    assert points.waiting_tokens == 0


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, SENTINEL]), st.integers(1, 8), st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_each_token_leaves_once_and_recompute_is_bounded(sample_id: int, first: int, sizes: list[int]) -> None:
    points = CutPoints(first, None)
    end = computed = 0
    left: list[tuple[int, int, int]] = []
    for index, size in enumerate(sizes):
        finish = "stop" if index == len(sizes) - 1 else None
        leaving = points.offer(chunk(sample_id, end, end + size, finish=finish), coarse=True)
        end += size
        if leaving:
            # without any cache a request computes everything up to its last token
            computed += leaving[-1].end
            left += spans(leaving)
    assert [start for _, start, _ in left] == [0, *(stop for _, _, stop in left[:-1])]
    assert left[-1][2] == end
    # a sentinel leaves with the chunk that reaches its cut point, so up to one chunk later
    assert computed <= (3 * end + len(sizes) * max(sizes) if sample_id == SENTINEL else end)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 2000))
def test_single_tokens_of_a_sentinel_are_computed_at_most_three_times(first: int, length: int) -> None:
    points = CutPoints(first, None)
    computed = 0
    for position in range(length):
        finish = "stop" if position == length - 1 else None
        if leaving := points.offer(chunk(SENTINEL, position, position + 1, finish=finish), coarse=True):
            computed += leaving[-1].end
    assert computed < 3 * length


def test_a_cold_start_is_no_verdict_and_a_cache_that_does_not_hold_is_one() -> None:
    cache = CacheShare(0.5)
    cache.observe(0, 0)
    cache.observe(500, 0)
    assert not cache.coarse and cache.share > 0.9
    for _ in range(30):
        cache.observe(4000, 100)
    assert cache.coarse and cache.share < 0.1
    for _ in range(8):
        cache.observe(4000, 3900)
    assert cache.coarse and 0.5 < cache.share < 0.75, "between the thresholds it stays as it is"
    # an engine may say more than the prefix that was asked about: a prompt that it knew from another sample
    for _ in range(30):
        cache.observe(4000, 9000)
    assert not cache.coarse and cache.share == pytest.approx(1.0, abs=0.1)


def test_zero_switches_it_off() -> None:
    cache = CacheShare(0.0)
    for _ in range(50):
        cache.observe(4000, 0)
    assert not cache.coarse
