"""The outbox: nothing leaves it before it is acknowledged, and context comes where a teacher needs it."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_chunks import PROMPT, chunk, context_to, token_ids

from opd_async.scheduling.outbox import Outbox
from opd_async.transport.messages import Chunk

NOTHING = np.zeros(0, np.int32)


def opened(sample_id: int = 1, teacher: int = 0, prefix: int = 0, attempt: int = 0) -> Outbox:
    box = Outbox()
    box.open(sample_id, attempt, teacher, PROMPT, token_ids(0, prefix))
    return box


def shown(pairs: list[tuple[int, Chunk]]) -> list[tuple[int, int, int, bool]]:
    """(teacher, start, end, with context) of what is to be sent."""
    return [(teacher, one.start, one.end, one.context is not None) for teacher, one in pairs]


def context(one: Chunk) -> list[int]:
    assert one.context is not None
    ids: list[int] = one.context.tolist()
    return ids


def test_the_first_chunk_carries_its_context_and_later_ones_do_not() -> None:
    box = opened()
    assert context(box.add(chunk(1, 0, 3), 0.0)) == PROMPT.tolist()
    assert box.add(chunk(1, 3, 5), 0.0).context is None
    assert box.unacknowledged == 2
    assert box.route_of(1) == 0


def test_an_attempt_behind_a_prefix_starts_with_all_of_it() -> None:
    box = opened(prefix=4, attempt=2)
    assert box.owed() == [(1, 2, 4)]
    assert context(box.add(chunk(1, 4, 6, attempt=2), 0.0)) == context_to(4).tolist()
    assert box.owed() == [(1, 2, 6)]


def test_acknowledged_chunks_leave_and_the_sample_with_its_end() -> None:
    box = opened()
    for start, end, finish in ((0, 3, None), (3, 5, None), (5, 5, "stop")):
        box.add(chunk(1, start, end, finish=finish), 0.0)
    box.acknowledge(1, 0, 3, 1.0)
    assert box.unacknowledged == 2
    box.acknowledge(1, 0, 5, 1.0)
    assert box.unacknowledged == 1, "the intake holds all tokens, but not that they are all"
    box.acknowledge(1, 0, 6, 1.0)
    assert box.unacknowledged == 0
    assert box.owed() == []


def test_a_sample_under_way_stays_when_everything_is_acknowledged() -> None:
    box = opened()
    box.add(chunk(1, 0, 3), 0.0)
    box.acknowledge(1, 0, 3, 1.0)
    assert box.owed() == [(1, 0, 3)]
    assert box.add(chunk(1, 3, 4), 2.0).context is None


def test_acknowledgements_of_others_change_nothing() -> None:
    box = opened(attempt=1)
    box.add(chunk(1, 0, 3, attempt=1), 0.0)
    box.acknowledge(1, 0, 9, 1.0)
    box.acknowledge(2, 0, 9, 1.0)
    assert box.unacknowledged == 1


def test_overdue_chunks_go_again_behind_their_context() -> None:
    box = opened(teacher=3)
    for start in (0, 2, 4):
        box.add(chunk(1, start, start + 2), 0.0)
    box.acknowledge(1, 0, 2, 5.0)
    assert shown(box.overdue(14.9, 10.0)) == []
    again = box.overdue(15.0, 10.0)
    assert shown(again) == [(3, 2, 4, True), (3, 4, 6, False)]
    assert context(again[0][1]) == context_to(2).tolist()
    assert shown(box.overdue(20.0, 10.0)) == [], "it was sent a moment ago"
    assert shown(box.overdue(25.0, 10.0)) == [(3, 2, 4, True), (3, 4, 6, False)]


def test_time_counts_from_the_first_chunk_that_waits() -> None:
    box = opened()
    box.add(chunk(1, 0, 2), 0.0)
    box.acknowledge(1, 0, 2, 1.0)
    box.add(chunk(1, 2, 4), 100.0)
    box.add(chunk(1, 4, 6), 105.0)
    assert shown(box.overdue(109.0, 10.0)) == []
    assert len(box.overdue(110.0, 10.0)) == 2


def test_a_restarted_teacher_gets_its_samples_again() -> None:
    box = opened(1, teacher=0)
    box.open(2, 0, 1, PROMPT, NOTHING)
    box.open(3, 0, 0, PROMPT, NOTHING)
    for sample_id in (1, 2, 3):
        box.add(chunk(sample_id, 0, 2), 0.0)
    box.acknowledge(3, 0, 2, 1.0)
    assert shown(box.teacher_restarted(0, 2.0)) == [(0, 0, 2, True)]
    assert box.add(chunk(1, 2, 3), 3.0).context is None, "its beginning is under way again"
    assert context(box.add(chunk(3, 2, 3), 3.0)) == context_to(2).tolist()
    assert box.add(chunk(2, 2, 3), 3.0).context is None


def test_cleared_samples_are_gone() -> None:
    box = opened()
    box.open(2, 0, 0, PROMPT, NOTHING)
    box.add(chunk(1, 0, 2), 0.0)
    assert box.owed() == [(1, 0, 2), (2, 0, 0)]
    box.clear()
    assert box.owed() == []
    assert box.overdue(99.0, 1.0) == []


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=8),
    st.lists(st.sampled_from(["send", "acknowledge", "lose", "restart", "wait"]), max_size=40),
    st.randoms(use_true_random=False),
)
def test_whatever_is_lost_the_intake_gets_everything(sizes: list[int], moves: list[str], random: object) -> None:
    """A receiver that accepts only what continues what it holds, or what comes with matching context."""
    ends = np.cumsum(sizes).tolist()
    waiting = [
        chunk(1, end - size, end, finish="stop" if end == ends[-1] else None)
        for size, end in zip(sizes, ends, strict=True)
    ]
    box, wire, received, now = opened(), [], 0, 0.0
    last = ends[-1] + 1

    def deliver() -> int:
        position = received
        for one in wire:
            if one.context is not None:
                assert one.context.tolist() == context_to(one.start).tolist()
            if one.start <= position < one.acknowledged_at:
                position = one.acknowledged_at
        wire.clear()
        return position

    for move in [*moves, *["send"] * len(waiting), *["wait", "acknowledge"] * 2]:
        now += 1.0
        if move == "send" and waiting:
            wire.append(box.add(waiting.pop(0), now))
        elif move == "lose":
            wire.clear()
        elif move == "restart":
            wire = [one for _, one in box.teacher_restarted(0, now)]
        elif move == "wait":
            now += 10.0
            wire.extend(one for _, one in box.overdue(now, 10.0))
        elif move == "acknowledge":
            received = deliver()
            box.acknowledge(1, 0, received, now)
    assert received == last
    assert box.owed() == []


def test_what_is_kept_carries_no_context() -> None:
    """Contexts are made when they are needed: keeping them would cost the square of a response's length."""
    box = opened()
    sent = box.add(chunk(1, 0, 3), 0.0)
    assert dataclasses.replace(sent, context=None) == box._entries[1].chunks[0]
