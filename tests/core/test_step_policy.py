"""What the policies choose, case by case; that they keep the bound is in test_staleness.py."""

from __future__ import annotations

from scored_chunks import held, scored

from opd_async.scheduling.assembly import Assembler
from opd_async.scheduling.step_policy import DeadlineCuts, WholeSamples, WholeSteps
from opd_async.transport.owed import OwedSample


def assembler(version: int = 0) -> Assembler:
    """Everything of older weights is here."""
    fresh = Assembler()
    fresh.start_at(version)
    return fresh


def chosen(policy: WholeSteps, box: Assembler, version: int) -> list[int]:
    return [sample.sample_id for sample in policy.choose(box, version)]


def test_a_step_waits_for_its_budget() -> None:
    box, policy = assembler(), DeadlineCuts(tokens_per_step=10, max_staleness=1)
    held(box, sample_id=1, end=6, finish="stop")
    held(box, sample_id=2, end=9)
    assert policy.ready_tokens(box, 0) == 6
    assert chosen(policy, box, 0) == []
    held(box, sample_id=3, end=4, finish="stop")
    assert chosen(policy, box, 0) == [1, 3]


def test_responses_under_way_are_cut_at_their_deadline_only() -> None:
    box, policy = assembler(), DeadlineCuts(tokens_per_step=4, max_staleness=2)
    held(box, sample_id=1, end=6)
    held(box, sample_id=2, end=5, weight_version=1)
    for version in (0, 1):
        box.mark(version, [])
    assert chosen(policy, box, 1) == []
    assert chosen(policy, box, 2) == [1]
    assert policy.ready_tokens(box, 2) == 6
    assert chosen(policy, box, 3) == [1, 2]


def test_deadlines_go_before_finished_responses_and_beyond_the_budget() -> None:
    box, policy = assembler(), DeadlineCuts(tokens_per_step=4, max_staleness=1)
    held(box, sample_id=1, end=3, weight_version=1, finish="stop")
    held(box, sample_id=2, end=4)
    held(box, sample_id=3, end=4)
    box.mark(0, [])
    assert chosen(policy, box, 1) == [2, 3]


def test_finished_responses_go_oldest_token_first() -> None:
    box, policy = assembler(), DeadlineCuts(tokens_per_step=3, max_staleness=4)
    held(box, sample_id=1, end=3, weight_version=2, finish="stop")
    held(box, sample_id=2, end=3, weight_version=1, finish="stop")
    held(box, sample_id=3, end=3, weight_version=1, finish="stop")
    for version in range(3):
        box.mark(version, [])
    assert chosen(policy, box, 3) == [2, 3]


def test_empty_responses_leave_with_the_next_step() -> None:
    box, policy = assembler(), DeadlineCuts(tokens_per_step=3, max_staleness=1)
    held(box, sample_id=1, end=0, finish="stop")
    assert chosen(policy, box, 0) == []
    held(box, sample_id=2, end=6, finish="stop")
    held(box, sample_id=3, end=3, finish="stop")
    assert chosen(policy, box, 0) == [1, 2]


def test_what_has_ended_fills_two_budgets() -> None:
    box, policy = assembler(), DeadlineCuts(tokens_per_step=4, max_staleness=3)
    for sample_id in range(4):
        held(box, sample_id=sample_id, end=3, finish="stop")
    held(box, sample_id=4, end=9)
    assert chosen(policy, box, 0) == [0, 1, 2]


def test_no_step_while_old_tokens_are_under_way() -> None:
    box, policy = assembler(), DeadlineCuts(tokens_per_step=3, max_staleness=1)
    held(box, sample_id=1, end=5, finish="stop")
    box.mark(0, [OwedSample(2, 0, 4)])
    assert chosen(policy, box, 1) == []
    held(box, sample_id=2, end=4)
    assert chosen(policy, box, 1) == [1, 2]


def test_on_policy_steps_ask_for_a_drain() -> None:
    box, policy = assembler(), DeadlineCuts(tokens_per_step=5, max_staleness=0)
    held(box, sample_id=1, end=4)
    assert not policy.wants_drain(box, 0)
    held(box, sample_id=2, end=4)
    assert policy.wants_drain(box, 0)
    assert chosen(policy, box, 0) == []
    box.mark(0, [OwedSample(1, 0, 6), OwedSample(2, 0, 4)])
    assert chosen(policy, box, 0) == []
    box.add(scored(1, 4, 6))
    assert chosen(policy, box, 0) == [1, 2]
    assert not DeadlineCuts(tokens_per_step=5, max_staleness=1).wants_drain(box, 0)


def test_whole_samples_take_batches_in_order() -> None:
    box, policy = assembler(), WholeSamples(2)
    held(box, sample_id=1, end=3, finish="stop")
    held(box, sample_id=2, end=3, finish="stop")
    assert policy.ready_tokens(box, 0) == 0
    assert chosen(policy, box, 0) == []
    held(box, sample_id=0, end=2)
    assert chosen(policy, box, 0) == []
    held(box, sample_id=0, end=5, finish="stop")
    assert policy.ready_tokens(box, 0) == 8
    assert chosen(policy, box, 0) == [0, 1]
    assert not policy.wants_drain(box, 0)
    for sample in policy.choose(box, 0):
        box.take(sample)
    assert chosen(policy, box, 1) == []
    held(box, sample_id=3, end=1, finish="stop")
    assert chosen(policy, box, 1) == [2, 3]


def test_a_step_of_whole_samples_has_whole_groups() -> None:
    """Samples n * group_size and on belong to one prompt; a batch of whole groups ends where a group ends."""
    box, policy = assembler(), WholeSamples(4)  # groups of two
    for sample_id in (0, 1, 2, 5, 7, 6):
        held(box, sample_id=sample_id, end=2, finish="stop")
    assert chosen(policy, box, 0) == []  # group 1 lacks sample 3, though four samples are there
    held(box, sample_id=3, end=0, finish="stop")  # an empty response completes it
    assert chosen(policy, box, 0) == [0, 1, 2, 3]
    for sample in policy.choose(box, 0):
        box.take(sample)
    held(box, sample_id=4, end=1, finish="stop")
    assert chosen(policy, box, 1) == [4, 5, 6, 7]
