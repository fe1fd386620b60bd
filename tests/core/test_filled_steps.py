"""What a filled step takes, part by part; that it keeps the bound is in test_staleness.py."""

from __future__ import annotations

import pytest
from scored_chunks import held

from opd_async.scheduling.assembly import Assembler
from opd_async.scheduling.filled_steps import PARTS, FilledSteps
from opd_async.transport.owed import OwedSample


def assembler() -> Assembler:
    """Everything of older weights is here."""
    fresh = Assembler()
    fresh.start_at(0)
    return fresh


def part(policy: FilledSteps, box: Assembler, version: int, taken: int) -> tuple[list[int], bool]:
    found = policy.round(box, version, taken)
    assert not found.drain
    return [sample.sample_id for sample in found.samples], found.closes


def test_responses_are_taken_as_they_end_a_part_at_a_time() -> None:
    box, policy = assembler(), FilledSteps(tokens_per_step=4 * PARTS, max_staleness=1)
    assert part(policy, box, 0, 0) == ([], False)
    held(box, sample_id=1, end=9)
    assert part(policy, box, 0, 0) == ([], False)
    for sample_id in (2, 3, 4):
        held(box, sample_id=sample_id, end=3, finish="stop")
    assert part(policy, box, 0, 0) == ([2, 3], False)
    assert policy.ready_tokens(box, 0) == 9
    assert policy.ready_tokens(box, 1) == 18


def test_what_is_forced_is_cut_last_and_closes_the_step() -> None:
    box, policy = assembler(), FilledSteps(tokens_per_step=4 * PARTS, max_staleness=1)
    held(box, sample_id=1, end=30)
    held(box, sample_id=2, end=8, weight_version=1)
    held(box, sample_id=3, end=20, weight_version=1, finish="stop")
    box.mark(0, [])
    assert part(policy, box, 1, 0) == ([3], False)
    box.take(box.samples[3])
    assert part(policy, box, 1, 20) == ([], False)
    assert part(policy, box, 1, 4 * PARTS - 33) == ([], False)  # room for three tokens, but nothing has ended
    held(box, sample_id=4, end=3, weight_version=1, finish="stop")
    assert part(policy, box, 1, 4 * PARTS - 33) == ([1, 4], True)
    assert part(policy, box, 1, 4 * PARTS) == ([1], True)


def test_an_ended_response_that_is_due_goes_whatever_room_is_left() -> None:
    box, policy = assembler(), FilledSteps(tokens_per_step=PARTS, max_staleness=1)
    for sample_id in range(3):
        held(box, sample_id=sample_id, end=PARTS, finish="stop")
    held(box, sample_id=3, end=PARTS, weight_version=1, finish="stop")
    box.mark(0, [])
    assert part(policy, box, 1, PARTS) == ([0, 1, 2], True)


def test_a_step_does_not_close_while_old_tokens_are_under_way() -> None:
    box, policy = assembler(), FilledSteps(tokens_per_step=PARTS, max_staleness=1)
    held(box, sample_id=1, end=PARTS, finish="stop")
    box.mark(0, [OwedSample(7, 0, 3)])
    assert part(policy, box, 1, PARTS) == ([], False)
    held(box, sample_id=7, end=3)
    assert part(policy, box, 1, PARTS) == ([7, 1], True)


def test_without_a_bound_nothing_is_cut() -> None:
    box, policy = assembler(), FilledSteps(tokens_per_step=PARTS, max_staleness=None)
    held(box, sample_id=1, end=50)
    for version in range(9):
        box.mark(version, [OwedSample(8, 0, 4)])
    assert part(policy, box, 9, PARTS - 1) == ([], False)
    held(box, sample_id=2, end=7, finish="stop")
    assert part(policy, box, 9, PARTS - 1) == ([2], True)
    assert not policy.overfull(box, 9, 0)


def test_without_staleness_a_full_step_asks_for_a_drain() -> None:
    box, policy = assembler(), FilledSteps(tokens_per_step=PARTS, max_staleness=0)
    held(box, sample_id=1, end=PARTS)
    found = policy.round(box, 0, 0)
    assert (found.samples, found.closes, found.drain) == ([], False, True)
    box.mark(0, [OwedSample(1, 0, PARTS)])
    assert part(policy, box, 0, 0) == ([1], True)


def test_empty_responses_leave_with_the_others() -> None:
    box, policy = assembler(), FilledSteps(tokens_per_step=4 * PARTS, max_staleness=1)
    held(box, sample_id=1, end=0, finish="stop")
    held(box, sample_id=2, end=3, finish="stop")
    assert part(policy, box, 0, 0) == ([1, 2], False)


def test_a_next_step_that_would_be_too_large_stands_generation_still_and_is_begun() -> None:
    """At S = 1 the next step has to train all that is held; what fits is cut before its time."""
    box, policy = assembler(), FilledSteps(tokens_per_step=10 * PARTS, max_staleness=1)
    for sample_id in range(9):
        held(box, sample_id=sample_id, end=2 * PARTS, weight_version=1)
    box.mark(0, [])
    assert not policy.overfull(box, 1, 0)  # ten parts of these eighteen fit into the open step
    assert part(policy, box, 1, 0) == ([], False)
    held(box, sample_id=10, end=2 * PARTS, weight_version=1)
    assert policy.overfull(box, 1, 0)
    assert part(policy, box, 1, 0) == ([0], False)
    assert not policy.overfull(box, 0, 0)  # the same tokens are younger for a later bound
    assert not FilledSteps(tokens_per_step=10 * PARTS, max_staleness=2).overfull(box, 1, 0)


@pytest.mark.parametrize(("max_staleness", "stands"), [(1, True), (2, False)])
def test_generation_goes_on_where_it_adds_nothing_to_a_next_step_that_is_full(max_staleness: int, stands: bool) -> None:
    """All that the next step has to train has ended: at S = 1 what begins now would come to it, later it does not."""
    box, policy = assembler(), FilledSteps(tokens_per_step=10 * PARTS, max_staleness=max_staleness)
    version = max_staleness - 1  # of the open step: what weights 0 have made is due in the next one
    for sample_id in range(10):
        held(box, sample_id=sample_id, end=2 * PARTS, finish="length")
    assert policy.overfull(box, version, 0) is stands
    held(box, sample_id=10, end=2 * PARTS)
    assert policy.overfull(box, version, 0), "one that is still generated would grow until then"


def test_a_step_that_is_bound_to_be_too_large_closes_as_soon_as_it_can() -> None:
    box, policy = assembler(), FilledSteps(tokens_per_step=10 * PARTS, max_staleness=1)
    for sample_id in (1, 2, 3):
        held(box, sample_id=sample_id, end=3 * PARTS, finish="stop")
    held(box, sample_id=4, end=2 * PARTS)
    assert part(policy, box, 1, PARTS - 1) == ([1], False)
    box.mark(0, [OwedSample(4, 0, 2 * PARTS + 1)])
    assert part(policy, box, 1, PARTS) == ([1], False)  # one token of the weights that are due is not here yet
    held(box, sample_id=4, end=2 * PARTS + 1)
    assert part(policy, box, 1, PARTS - 2) == ([1], False)
    assert part(policy, box, 1, PARTS - 1) == ([4, 1, 2, 3], True)
    assert part(FilledSteps(tokens_per_step=10 * PARTS, max_staleness=2), box, 1, PARTS - 1) == ([1], False)
