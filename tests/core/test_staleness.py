"""The age bound, exactly-once training and progress, over random schedules of the real state machines.

Each byte pair of a schedule is one event: tokens are made, chunks travel, get lost or come twice, processes die, the
learner steps. A failing schedule shrinks to the few events that matter, since the event 0 does nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from staleness_oracle import BrokenInvariant
from staleness_sim import Deadlock, Setup, Simulation, play

from opd_async.config.topology import TrainOn
from opd_async.scheduling.assembly import Assembler, Sample
from opd_async.scheduling.filled_samples import FilledSamples
from opd_async.scheduling.filled_steps import FilledSteps
from opd_async.scheduling.marks import Marks
from opd_async.scheduling.outbox import Outbox
from opd_async.scheduling.segments import Piece
from opd_async.scheduling.step_policy import DeadlineCuts, Round, StepPolicy, WholeSamples

EVENTS = 600
BOUNDS = (0, 1, 2, 4)
RULES = [*((mode, False, bound) for mode in TrainOn for bound in BOUNDS)]
RULES += [(TrainOn.SAMPLES, True, bound) for bound in BOUNDS]
RULES += [(TrainOn.TOKENS, True, bound) for bound in (*BOUNDS, None)]
"""(train_on, filled steps, bound)."""


def name(value: object) -> str:
    """Names of parameters."""
    return {False: "whole", True: "filled", None: "none"}.get(value) if isinstance(value, bool | None) else str(value)


@st.composite
def setups(draw: st.DrawFn, train_on: TrainOn, filled: bool, max_staleness: int | None) -> Setup:
    """Sizes around the edges: one slot, one actor, chunks of one token, budgets below one chunk."""
    return Setup(
        max_staleness,
        train_on,
        slots=draw(st.integers(1, 5)),
        tokens_per_step=draw(st.integers(1, 16)),
        samples_per_step=draw(st.integers(1, 3)),
        chunk_tokens=draw(st.integers(1, 6)),
        batch_tokens=draw(st.integers(1, 12)),
        actors=draw(st.integers(1, 3)),
        teachers=draw(st.integers(1, 2)),
        max_length=draw(st.integers(6, 24)),
        seed=draw(st.integers(0, 99)),
        filled=filled,
        spans=draw(st.booleans()),
        further=draw(st.booleans()),
    )


@pytest.mark.parametrize(("train_on", "filled", "max_staleness"), RULES, ids=name)
def test_every_schedule_keeps_the_bound_and_ends(train_on: TrainOn, filled: bool, max_staleness: int | None) -> None:
    @settings(max_examples=60, deadline=None)
    @given(setups(train_on, filled, max_staleness), st.binary(min_size=2 * EVENTS, max_size=2 * EVENTS))
    def check(setup: Setup, schedule: bytes) -> None:
        play(setup, schedule)

    check()


@pytest.mark.parametrize(("train_on", "filled", "max_staleness"), RULES, ids=name)
def test_long_schedules(train_on: TrainOn, filled: bool, max_staleness: int | None) -> None:
    versions = []
    for seed in range(12):
        simulation = Simulation(Setup(max_staleness, train_on, seed=seed, filled=filled, further=seed % 2 == 1))
        simulation.run(random.Random(seed).randbytes(5000))
        versions.append(simulation.version)
        simulation.finish()
        assert (simulation.begun > 5) == (seed % 2 == 1)
    assert sum(versions) > 2 * len(versions), "the schedules hardly train; their events are out of balance"


@pytest.mark.parametrize("filled", [False, True], ids=name)
def test_ages_reach_the_bound(filled: bool) -> None:
    """The bound is not kept by training everything at once: each age up to it occurs, and responses are cut."""
    ages: set[int] = set()
    cuts = 0
    for seed in range(20):
        simulation = play(Setup(2, seed=seed, filled=filled), random.Random(seed).randbytes(3000))
        for version, rows in simulation.oracle.steps:
            for row in rows:
                if row.segment is not None:
                    cuts += not row.complete
                    ages.update((version - row.segment.versions).tolist())
    assert ages == {0, 1, 2}
    assert cuts


# --- the checker sees what it must see -------------------------------------------------------------------------------


class OffByOne(DeadlineCuts):
    """Cuts one step too late."""

    def __init__(self, tokens_per_step: int, max_staleness: int) -> None:
        super().__init__(tokens_per_step, max_staleness + 1)


class Impatient(DeadlineCuts):
    """Does not wait for tokens that exist but are not scored yet."""

    def choose(self, assembler: Assembler, version: int) -> list[Sample]:
        assembler._marks = Marks()
        assembler.start_at(version + 1)
        return super().choose(assembler, version)


class Forgetful(DeadlineCuts):
    """Drops a token here and there."""

    def choose(self, assembler: Assembler, version: int) -> list[Sample]:
        chosen = super().choose(assembler, version)
        for sample in chosen:
            if len(sample.untrained) > 1:
                sample.untrained.pop(0)
        return chosen


def caught(setup: Setup, policy: Callable[[int, int], StepPolicy]) -> list[BrokenInvariant]:
    """What the checker says of a policy, over a number of schedules."""
    found: list[BrokenInvariant] = []
    for seed in range(25):
        try:
            play(setup, random.Random(seed).randbytes(3000), policy(setup.tokens_per_step, setup.max_staleness or 0))
        except BrokenInvariant as error:
            found.append(error)
    return found


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
def test_a_deadline_that_is_late_by_one_is_caught(max_staleness: int) -> None:
    assert any("too old" in str(error) for error in caught(Setup(max_staleness), OffByOne))


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_planning_before_everything_is_here_is_caught(max_staleness: int) -> None:
    assert any("too old" in str(error) for error in caught(Setup(max_staleness), Impatient))


def test_lost_tokens_are_caught() -> None:
    assert caught(Setup(1), Forgetful)


def test_a_planner_that_never_steps_is_a_deadlock() -> None:
    policy = DeadlineCuts(tokens_per_step=10**9, max_staleness=1)
    with pytest.raises(Deadlock, match="no end at version 0"):
        play(Setup(1), b"", policy)


def test_an_outbox_that_never_sends_again_is_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "overdue", lambda *_: [])
    monkeypatch.setattr(Outbox, "teacher_restarted", lambda *_: [])
    with pytest.raises(Deadlock):
        for seed in range(25):
            play(Setup(1), random.Random(seed).randbytes(3000))


def test_admission_that_is_late_by_one_is_caught() -> None:
    """Whole samples: leases of one batch too many break the bound."""
    generous = Setup(2, TrainOn.SAMPLES)
    with pytest.raises(BrokenInvariant, match="too old"):
        for seed in range(25):
            simulation = Simulation(generous, WholeSamples(generous.samples_per_step))
            simulation.oracle.max_staleness = 1
            simulation.run(random.Random(seed).randbytes(3000))
            simulation.finish()


def test_training_a_step_twice_is_caught() -> None:
    simulation = play(Setup(1), random.Random(3).randbytes(3000))
    version, rows = simulation.oracle.steps[-1]
    with pytest.raises(BrokenInvariant, match="trained"):
        simulation.oracle.step(version + 1, rows)


# --- the same for filled steps ---------------------------------------------------------------------------------------


class LateCut(FilledSteps):
    """Cuts one step too late."""

    def __init__(self, tokens_per_step: int, max_staleness: int) -> None:
        super().__init__(tokens_per_step, max_staleness + 1)


class Hasty(FilledSteps):
    """Closes a step before what its deadline forces is here."""

    def round(self, assembler: Assembler, version: int, taken: int) -> Round:
        assembler._marks = Marks()
        assembler.start_at(version + 1)
        return super().round(assembler, version, taken)


class Repeating(FilledSteps):
    """What an earlier part has taken of a response is in a later one again."""

    def round(self, assembler: Assembler, version: int, taken: int) -> Round:
        found = super().round(assembler, version, taken)
        for sample in found.samples if found.closes else []:
            if sample.trained and len(sample.trained[-1]):
                again = sample.trained.pop()
                sample.trained_end -= len(again)
                fill = np.full(len(again), -1.0, np.float32)
                sample.untrained.insert(
                    0, Piece(version=version, token_ids=again, behaviour_logprobs=fill, teacher_logprobs=fill)
                )
        return found


class Endless(FilledSteps):
    """Takes part after part and closes nothing."""

    def round(self, assembler: Assembler, version: int, taken: int) -> Round:
        return Round(super().round(assembler, version, taken).samples)


class Careless(FilledSteps):
    """Closes without what has to be cut."""

    def round(self, assembler: Assembler, version: int, taken: int) -> Round:
        found = super().round(assembler, version, taken)
        return Round([sample for sample in found.samples if sample.finish is not None], found.closes, found.drain)


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
def test_filled_steps_that_cut_too_late_are_caught(max_staleness: int) -> None:
    assert any("too old" in str(error) for error in caught(Setup(max_staleness, filled=True), LateCut))
    assert any("too old" in str(error) for error in caught(Setup(max_staleness, filled=True), Careless))


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_filled_step_that_closes_before_its_versions_are_settled_is_caught(max_staleness: int) -> None:
    assert any("too old" in str(error) for error in caught(Setup(max_staleness, filled=True), Hasty))


def test_a_sample_that_two_steps_or_parts_train_is_caught() -> None:
    assert any("were trained before" in str(error) for error in caught(Setup(1, filled=True), Repeating))


def test_a_filled_step_that_never_closes_is_a_deadlock() -> None:
    assert any(isinstance(error, Deadlock) for error in caught(Setup(1, filled=True), Endless))


class ClosesEarly(FilledSamples):
    """Closes a step although a response of its batch has not ended."""

    def round(self, assembler: Assembler, version: int, taken: int) -> Round:
        found = super().round(assembler, version, taken)
        return Round(found.samples, closes=bool(found.samples))


def test_a_step_of_groups_that_closes_before_its_last_one_is_caught() -> None:
    setup = Setup(1, TrainOn.SAMPLES, samples_per_step=3, filled=True)
    broken = caught(setup, lambda *_: ClosesEarly(setup.samples_per_step, 1))
    assert any("too old" in str(error) for error in broken)


def test_a_part_of_a_step_that_has_closed_is_caught() -> None:
    simulation = play(Setup(1, filled=True), random.Random(3).randbytes(3000))
    version, _ = simulation.oracle.steps[-1]
    with pytest.raises(BrokenInvariant, match=f"step {version} after step {version}"):
        simulation.oracle.step(version, [])
    simulation.oracle.step(version + 1, [], closes=False)
    with pytest.raises(BrokenInvariant, match="is open"):
        simulation.oracle.step(version + 2, [])
