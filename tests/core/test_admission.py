"""When a response may begin beside filled steps; the other rules are in test_leases.py."""

from __future__ import annotations

from dataclasses import replace

from opd_async.bench.sim.presets import PRESETS
from opd_async.bench.sim.rules import Scoring, filled
from opd_async.bench.sim.simulation import Simulation
from opd_async.scheduling.admission import FEWEST, PACED, STARVED, WAITING, FilledAdmission, Flow, Front


def flow(waiting: int = 0, generating: int = 4) -> Flow:
    return Flow(sample_id=0, version=0, waiting_tokens=waiting, generating=generating, slots=8)


def test_ended_responses_hold_new_ones_back() -> None:
    rule, uncut = FilledAdmission(100, 1), FilledAdmission(100, None)
    assert rule.admits(flow(waiting=round(100 * WAITING) - 1))
    assert not rule.admits(flow(waiting=round(100 * WAITING)))
    assert uncut.admits(flow(waiting=24)) and not uncut.admits(flow(waiting=25))


def test_a_learner_that_starved_behind_full_hands_has_responses_paced() -> None:
    def waits(waiting: int, generating: int = 0) -> Flow:
        return replace(flow(waiting=waiting, generating=generating), mean_tokens=50.0)  # eight slots: four budgets

    rule = FilledAdmission(100, 8)
    rule.closed(100, 0.9)  # it waited for the first responses of all: none had been held back
    assert not rule.admits(waits(350))
    rule.closed(100, 0.0)
    assert not rule.admits(waits(350))
    rule.closed(100, STARVED + 0.01)
    assert rule.admits(waits(350)) and not rule.admits(waits(351))  # a slot is taken until its tokens are trained
    assert rule.admits(waits(100, generating=5)) and not rule.admits(waits(100, generating=6))
    for _ in range(PACED - 1):
        rule.closed(100, 0.0)
        assert rule.admits(waits(350))
    rule.closed(100, 0.0)
    assert not rule.admits(waits(350))
    bounded = FilledAdmission(100, 1)
    assert not bounded.admits(waits(350))
    bounded.closed(100, 0.9)
    bounded.opened(0, False)
    assert not bounded.admits(waits(200)) and bounded.admits(waits(199))  # no more than its steps can train


def test_responses_of_one_length_do_not_march_in_step() -> None:
    """Slots for four budgets of responses that nearly all go to their limit, and three devices that are as fast: the
    learner starved for half of its time (.58 and .49 of the bound)."""
    for staleness, share in ((4, 0.72), (None, 0.76)):
        row = Simulation(PRESETS["limit"], filled(staleness), Scoring.STREAMED, 0).run(8, 24)
        assert row.share_of_bound > share and row.age_mean < 2.5 and row.step_tokens < 1.06


def test_a_step_behind_its_front_lets_nothing_begin_but_for_a_learner_without_work() -> None:
    rule = FilledAdmission(100, 1)
    rule.closed(125, 0.0)
    assert round(rule.front.budgets, 9) == 0.75
    rule.opened(74, False)
    assert rule.admits(flow())
    rule.opened(76, False)
    assert not rule.admits(flow(generating=0))
    rule.opened(76, True)
    assert rule.admits(flow(generating=round(8 * FEWEST) - 1))
    assert not rule.admits(flow(generating=round(8 * FEWEST)))
    rule.closed(100, 0.0)
    assert rule.admits(flow())


def test_the_front_starts_at_one_and_comes_down_by_what_is_too_much() -> None:
    front = Front(1)
    for size, budgets in ((1.0, 1.0), (1.02, 1.0), (1.3, 0.7), (1.03, 0.67), (9.0, 0.37), (9.0, 0.2), (9.0, 0.2)):
        front.closed(size, 0.0)
        assert abs(front.budgets - budgets) < 1e-9


def test_the_front_goes_up_while_the_learner_waits_but_not_just_behind_a_large_step() -> None:
    front = Front(1)
    front.closed(1.3, 0.0)
    for waited, budgets in ((0.5, 0.7), (0.5, 0.7), (0.0, 0.7), (0.5, 0.8), (0.02, 0.83), (0.01, 0.83)):
        front.closed(1.0, waited)
        assert abs(front.budgets - budgets) < 1e-9
    front.closed(1.1, 0.5)
    assert abs(front.budgets - 0.93) < 1e-9
    for size, budgets in ((1.12, 0.9), (1.25, 0.75)):  # it waited, but for a step far too large
        front.closed(size, 0.5)
        assert abs(front.budgets - budgets) < 1e-9
    for _ in range(20):
        front.closed(1.0, 0.5)
    assert front.budgets == 1.0
    later = Front(2)  # the steps behind it take what is too much
    later.closed(1.5, 0.5)
    assert later.budgets == 1.0


def test_the_front_comes_down_after_a_step_in_which_generation_stood_still() -> None:
    rule = FilledAdmission(100, 1)
    rule.held()
    for budgets in (0.9, 0.9):  # it stood still in the first of two steps, both of the right size
        rule.closed(100, 0.0)
        assert abs(rule.front.budgets - budgets) < 1e-9
    rule.held()
    rule.closed(125, 0.5)
    assert abs(rule.front.budgets - 0.75) < 1e-9


def test_without_a_bound_there_is_no_front() -> None:
    rule = FilledAdmission(100, None)
    rule.closed(150, 0.0)
    assert rule.front.budgets == 1.0


def test_no_more_is_under_way_than_the_steps_of_the_bound_can_train() -> None:
    def full(rule: FilledAdmission, generating: int, waiting: int, mean: float) -> bool:
        return not rule.admits(replace(flow(waiting, generating), slots=50, mean_tokens=mean))

    rule = FilledAdmission(100, 1)
    assert not full(rule, 50, 40, 0.0)
    assert full(rule, 40, 40, 4.0) and not full(rule, 39, 40, 4.0)
    rule.opened(20, idle=False)
    assert full(rule, 35, 40, 4.0) and not full(rule, 34, 40, 4.0)
    assert not full(FilledAdmission(100, 2), 49, 40, 4.0) and full(FilledAdmission(100, 0), 40, 40, 4.0)
    assert not full(FilledAdmission(100, None), 50, 20, 1e9)
    rule.opened(0, idle=True)
    assert not full(rule, 12, 0, 1e9)  # a learner without work
