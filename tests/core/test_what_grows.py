"""What the scheduling state machines hold does not grow with the samples that have passed, under every rule."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from staleness_sim import Setup, Simulation

from opd_async.actors.intake import report
from opd_async.actors.intake.report import LatencyReservoir
from opd_async.config.topology import TrainOn

FEW, MANY = 200, 1000
"""Samples that have passed at the two looks."""
KINDS = (type, type(sys), type(len), type(lambda: None))
"""Of code, which everybody shares."""


def bytes_of(roots: Iterable[Any], without: Iterable[Any]) -> int:
    """Bytes of all that can be reached from the roots, and not through `without`."""
    seen, open_ones, total = {id(one) for one in without}, list(roots), 0
    while open_ones:
        one = open_ones.pop()
        if id(one) in seen or isinstance(one, KINDS):
            continue
        seen.add(id(one))
        total += one.nbytes if isinstance(one, np.ndarray) else sys.getsizeof(one)
        open_ones += gc.get_referents(one)
    return total


def held(run: Simulation) -> int:
    """The least bytes that book, intake, actors and teachers hold over some rounds; what passes comes and goes."""
    found = sys.maxsize
    for turn in range(60):
        run._round(turn)
        intake = run._intake
        roots = (run._book, run._policy, run._actors, run._teachers, intake.assembler, intake._touched)
        found = min(found, bytes_of((*roots, intake._finished, run._scored, run._done), (run.oracle,)))
    return found


def after(run: Simulation, samples: int) -> int:
    """What is held once so many samples have passed."""
    turn = 0
    while len(run._intake.assembler.completed) < samples:
        run._round(turn)
        turn += 1
        assert turn < 100 * samples, run._state()
    return held(run)


@pytest.mark.parametrize(
    ("train_on", "filled", "bound"),
    [
        (TrainOn.TOKENS, False, 1),
        (TrainOn.TOKENS, False, 0),
        (TrainOn.TOKENS, True, 1),
        (TrainOn.TOKENS, True, None),
        (TrainOn.SAMPLES, False, 1),
        (TrainOn.SAMPLES, True, 1),
    ],
)
def test_nothing_grows_with_the_samples(train_on: TrainOn, filled: bool, bound: int | None) -> None:
    run = Simulation(Setup(bound, train_on, filled=filled, slots=8, tokens_per_step=32, samples_per_step=4))
    few = after(run, FEW)
    many = after(run, MANY)
    assert few > 5_000
    # one number for each sample would be ten times as much
    assert many - few < 4 * (MANY - FEW), (few, many)


def test_a_container_that_keeps_every_sample_is_found() -> None:
    run = Simulation(Setup(1, slots=8, tokens_per_step=32))
    few = after(run, FEW)
    run._policy.kept = list(range(1000, 1000 + MANY - FEW))  # type: ignore[attr-defined]
    assert held(run) - few > 4 * (MANY - FEW)


def test_latencies_take_their_memory_at_once() -> None:
    latencies = LatencyReservoir()
    before = bytes_of([latencies], ())
    for _ in range(2 * report.RESERVOIR):
        latencies.add(1.5)
    assert abs(bytes_of([latencies], ()) - before) < 100
    assert latencies.quantiles() == {"score_latency_p50_s": 1.5, "score_latency_p99_s": 1.5}
