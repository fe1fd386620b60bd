"""The restart budget under a virtual clock."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.scheduling.restarts import MAX_BACKOFF_S, RestartBudget

ROLES = st.sampled_from(["rollout-0", "teacher-0"])


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_wait_doubles_until_the_budget_is_spent() -> None:
    clock = Clock()
    budget = RestartBudget(3, 3600.0, 0.5, clock)
    delays = []
    while (delay := budget.next_delay("learner-0")) is not None:
        delays.append(delay)
        clock.now += delay
    assert delays == [0.5, 1.0, 2.0]
    clock.now += 3590.0
    assert budget.next_delay("learner-0") is None
    assert budget.used == {"learner-0": 3}


def test_a_run_of_weeks_bears_a_death_a_day_without_ever_waiting_longer() -> None:
    clock = Clock()
    budget = RestartBudget(1, 3600.0, 0.5, clock)
    for _ in range(30):
        assert budget.next_delay("learner-0") == 0.5
        clock.now += 86400.0
    assert budget.used == {"learner-0": 30}


def test_the_wait_shrinks_as_restarts_grow_old() -> None:
    clock = Clock()
    budget = RestartBudget(5, 100.0, 1.0, clock)
    delays = []
    for moment in (0.0, 40.0, 80.0, 110.0, 300.0):
        clock.now = 1000.0 + moment
        delays.append(budget.next_delay("teacher-0"))
    assert delays == [1.0, 2.0, 4.0, 4.0, 1.0]


def test_no_restarts_at_all() -> None:
    budget = RestartBudget(0, 3600.0, 0.5, Clock())
    assert budget.next_delay("learner-0") is None
    assert budget.used == {}


@settings(deadline=None, max_examples=100)
@given(
    limit=st.integers(0, 2000),
    backoff=st.floats(1e-3, 100),
    deaths=st.lists(st.tuples(ROLES, st.floats(0, 100)), max_size=60),
)
def test_every_restart_is_within_the_budget(limit: int, backoff: float, deaths: list[tuple[str, float]]) -> None:
    """A model: deaths before the due time are free, the n-th paid one waits backoff * 2**(n-1), capped."""
    clock = Clock()
    budget = RestartBudget(limit, 1e9, backoff, clock)
    due = {"rollout-0": -math.inf, "teacher-0": -math.inf}
    used = {"rollout-0": 0, "teacher-0": 0}
    for role, later in deaths:
        clock.now += later
        delay = budget.next_delay(role)
        if clock.now < due[role]:
            assert delay == due[role] - clock.now
        elif used[role] == limit:
            assert delay is None
        else:
            assert delay == min(MAX_BACKOFF_S, backoff * 2 ** used[role])
            used[role] += 1
            due[role] = clock.now + delay
    assert budget.used == {role: count for role, count in used.items() if count}


def test_a_very_large_budget_does_not_overflow() -> None:
    clock = Clock()
    budget = RestartBudget(5000, 1e9, 0.5, clock)
    for _ in range(5000):
        delay = budget.next_delay("rollout-0")
        assert delay is not None and delay <= MAX_BACKOFF_S
        clock.now += delay
