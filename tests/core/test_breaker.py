"""The circuit breaker on a clock of the test, with chance set to its middle."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.errors import EngineFault
from opd_async.scheduling.breaker import BACKOFF_S, MAX_BACKOFF_S, REFUSALS, Breaker, BreakerState, Failures, backoff_s


def breaker(failures: int = 3, chance: float = 0.5) -> Breaker:
    """Cool-downs are exactly 1, 2, 4 and 4 s with chance 0.5."""
    return Breaker(lambda: chance, failures, 1.0, 4.0)


def opened(now: float = 0.0) -> Breaker:
    one = breaker()
    for _ in range(3):
        one.failed(now)
    assert one.state is BreakerState.OPEN
    return one


def test_opens_after_failures_in_a_row_only() -> None:
    one = breaker()
    for _ in range(5):
        one.failed(0.0)
        one.failed(0.0)
        one.succeeded()
    assert one.state is BreakerState.CLOSED and one.allow(0.0)
    one.failed(0.0)
    one.failed(0.0)
    assert one.allow(0.0)
    one.failed(0.0)
    assert not one.allow(0.9)


def test_one_probe_after_the_cool_down() -> None:
    one = opened()
    assert one.probe_at == 1.0
    assert one.allow(1.0) and one.state is BreakerState.HALF_OPEN
    assert not one.allow(1.1), "a second request while the probe is under way"
    one.succeeded()
    assert one.state is BreakerState.CLOSED and one.allow(1.2)


def test_failed_probes_double_the_cool_down_up_to_a_limit() -> None:
    one = opened()
    now = 0.0
    waits = []
    for _ in range(4):
        waits.append(one.probe_at - now)
        now = one.probe_at
        assert one.allow(now)
        one.failed(now)
    assert waits == [1.0, 2.0, 4.0, 4.0]
    assert one.allow(now + 4.0)
    one.succeeded()
    for _ in range(3):
        one.failed(now)
    assert one.probe_at == now + 1.0, "a success forgives"


def test_a_lost_probe_is_replaced() -> None:
    one = opened()
    assert one.allow(1.0)
    assert not one.allow(1.9) and one.allow(2.0)


def test_late_results_of_old_requests() -> None:
    one = opened()
    one.failed(0.5)
    assert one.state is BreakerState.OPEN and one.probe_at == 1.0, "a late failure is no news"
    one.succeeded()
    assert one.state is BreakerState.CLOSED, "a late success is"


def test_a_trip_opens_at_once() -> None:
    one = breaker()
    one.trip(7.0)
    assert one.state is BreakerState.OPEN and not one.allow(7.0)
    assert one.allow(8.0)
    one.trip(8.0)
    assert one.probe_at == 10.0


def test_how_long_it_has_been_failing() -> None:
    one = breaker()
    assert one.failing_for(9.0) == 0.0
    one.failed(10.0)
    one.failed(12.0)
    assert one.failing_for(15.0) == 5.0
    one.succeeded()
    assert one.failing_for(16.0) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.sampled_from("sftw"), max_size=60))
def test_never_two_requests_within_half_a_cool_down_of_an_opening(seed: int, moves: list[str]) -> None:
    one = Breaker(random.Random(seed).random, 2, 1.0, 8.0)
    now = opened_at = 0.0
    for move in moves:
        was = one.state
        now += 0.1
        if move == "s":
            one.succeeded()
        elif move == "f":
            one.failed(now)
        elif move == "t":
            one.trip(now)
        else:
            allowed = one.allow(now)
            assert allowed or one.state is not BreakerState.CLOSED
            assert not (allowed and was is BreakerState.OPEN and now < opened_at + 0.5)
        if one.state is BreakerState.OPEN and was is not BreakerState.OPEN:
            opened_at = now
        assert one.state is not BreakerState.OPEN or one.probe_at <= opened_at + 1.5 * 8.0


@pytest.mark.parametrize("chance", [0.0, 0.999])
def test_backoff_doubles_with_jitter(chance: float) -> None:
    waits = [backoff_s(failures, lambda: chance) for failures in range(1, 40)]
    assert waits[0] == pytest.approx(BACKOFF_S * (0.5 + 0.5 * chance))
    assert waits[1] == pytest.approx(2 * waits[0])
    assert max(waits) <= MAX_BACKOFF_S and waits[-1] >= MAX_BACKOFF_S / 2


def tries_until_hopeless(limit: int, *faults: EngineFault) -> int:
    failures = Failures()
    for n, fault in enumerate(itertools.cycle(faults), 1):
        failures.count(fault)
        if failures.hopeless(limit):
            return n
    raise AssertionError


def test_refusals_are_given_up_early() -> None:
    assert tries_until_hopeless(5, EngineFault.REFUSED) == REFUSALS
    assert tries_until_hopeless(5, EngineFault.MALFORMED) == 6
    assert tries_until_hopeless(0, EngineFault.REFUSED) == 1


def test_a_refusal_behind_other_failures_is_the_first() -> None:
    assert tries_until_hopeless(5, EngineFault.MALFORMED, EngineFault.MALFORMED, EngineFault.REFUSED) == 6
    assert tries_until_hopeless(9, EngineFault.MALFORMED, EngineFault.REFUSED) == 2 * REFUSALS


def test_temporary_faults_are_no_reason_to_give_up() -> None:
    failures = Failures()
    for _ in range(100):
        failures.count(EngineFault.BUSY)
    assert failures.counted == 0 and not failures.hopeless(0)
