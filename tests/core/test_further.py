"""Samples that episodes begin beside their own: numbered, leased, ended, and trained with their group."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from scored_chunks import frontier_of, held, scored
from small_runs import small_topology
from staleness_oracle import BrokenInvariant
from staleness_sim import Deadlock, Setup, Simulation, play

from opd_async.actors.intake.report import describe_rewards
from opd_async.actors.intake.steps import Taken, give_advantages
from opd_async.config.estimators import Estimator
from opd_async.config.learning import AdvantageSection
from opd_async.config.topology import TrainOn
from opd_async.estimators.advantages import Outcome, estimate, flat_groups
from opd_async.scheduling import frontier
from opd_async.scheduling.admission import DeadlineAdmission
from opd_async.scheduling.assembly import Assembler, Resumable, Sample, Verdict
from opd_async.scheduling.filled_samples import FilledSamples
from opd_async.scheduling.further import FURTHER_IDS, MAX_FURTHER
from opd_async.scheduling.leases import UNDER_WAY, LeaseBook, LeaseSpec, PromptOrder
from opd_async.scheduling.step_policy import WholeSamples
from opd_async.transport.messages import Frontier
from opd_async.transport.owed import OwedSample

F = FURTHER_IDS


def book(slots: int = 2, state: Frontier | None = None, attempt: int = 0) -> LeaseBook:
    order = PromptOrder(100, 1, 0, shuffle=False)
    return LeaseBook(state or frontier.empty(0), order, DeadlineAdmission(1000, 1), slots, attempt)


def begun(leases: LeaseBook, sample_id: int, actor: str = "a", attempt: int = 0) -> LeaseSpec:
    spec = leases.further(sample_id, attempt, actor)
    assert spec is not None
    return spec


# --- leases -----------------------------------------------------------------------------------------------------------


def test_they_are_numbered_one_after_the_other_and_have_the_prompt_of_their_episode() -> None:
    leases = book()
    leases.lease("a", 0)
    leases.lease("b", 0)
    specs = [begun(leases, 1, "b"), begun(leases, 0), begun(leases, 1, "b")]
    assert [(spec.sample_id - F, spec.episode, spec.prompt_index) for spec in specs] == [
        (0, 1, 1),
        (1, 0, 0),
        (2, 1, 1),
    ]
    assert leases.was_leased(F + 2) and not leases.was_leased(F + 3)
    assert (leases.holder(F), leases.holder(F + 1), leases.attempt_of(F + 2)) == ("b", "a", 0)


def test_only_an_episode_that_is_under_way_has_one() -> None:
    leases = book()
    leases.lease("a", 0)
    further = begun(leases, 0)
    assert leases.further(0, 1, "a") is None, "another attempt"
    assert leases.further(0, 0, "b") is None, "another actor"
    assert leases.further(7, 0, "a") is None, "never leased"
    assert leases.further(further.sample_id, 0, "a") is None, "no episode of its own"
    for _ in range(MAX_FURTHER - 1):
        begun(leases, 0)
    assert leases.further(0, 0, "a") is None, "too many"
    leases.ended(0, 0, 5)
    leases.lease("a", 0)
    leases.ended(1, 0, 5)
    assert leases.further(1, 0, "a") is None, "it has ended"


def test_they_take_slots_while_they_are_generated_and_begin_whatever_is_full() -> None:
    leases = book(slots=2)
    leases.lease("a", 0)
    assert leases.lease("a", 0) is not None and leases.lease("a", 0) is None
    begun(leases, 0)
    assert leases.generating == 3
    leases.away(0, 0, True)
    leases.away(1, 0, True)
    assert leases.generating == 1 and leases.lease("a", 0) is not None
    leases.away(F, 0, True)
    assert leases.generating == 1
    leases.away(F, 0, False)
    leases.ended(F, 0, 4)
    assert leases.generating == 1 and leases.waiting_tokens == 4
    assert leases.generating_by("a") == 3, "leases alone"


def test_conversations_that_wait_for_the_end_of_their_episode_keep_no_lease_back() -> None:
    leases = book(slots=2)
    for sample_id in range(2 * UNDER_WAY - 1):
        leases.lease("a", 0)
        leases.away(sample_id, 0, True)
        for _ in range(5):
            leases.away(begun(leases, sample_id).sample_id, 0, True)
    assert leases.lease("a", 0) is not None and leases.lease("a", 0) is None


def test_what_was_never_begun_is_forgotten() -> None:
    leases = book()
    leases.lease("a", 0)
    begun(leases, 0)
    leases.unused(F, 1)
    leases.unused(0, 0)
    assert leases.holder(F) == leases.holder(0) == "a" and leases.generating == 2
    leases.unused(F, 0)
    assert leases.holder(F) is None and leases.generating == 1


def test_one_in_which_nothing_was_sampled_is_held_until_it_is_trained() -> None:
    leases = book()
    leases.lease("a", 0)
    begun(leases, 0)
    leases.ended(F, 0, 0)
    assert [spec.sample_id for spec in leases.held_by("a")] == [0, F], "its end may be lost with its actor"
    leases.trained(F, 3, True, 3)
    assert leases.is_completed(F) and leases.active == 1


def test_one_whose_actor_died_is_leased_to_nobody() -> None:
    leases = book()
    leases.lease("a", 0)
    begun(leases, 0)
    begun(leases, 0)
    leases.ended(F + 1, 0, 6)
    leases.trained(F + 1, 2, False)
    assert [spec.sample_id for spec in leases.held_by("a")] == [0, F, F + 1]
    for sample_id, complete in ((0, False), (F, True), (F + 1, True)):
        leases.give_back(sample_id, 1, np.zeros(0, np.int32), complete)
    assert (leases.active, leases.generating, leases.waiting_tokens) == (0, 0, 0)
    again = leases.lease("b", 0)
    assert again is not None and (again.sample_id, again.attempt) == (0, 1)
    assert begun(leases, 0, "b", attempt=1).sample_id == F + 2
    leases.trained(F, 4, True)
    assert leases.is_completed(F) and leases.active == 2


def test_a_resumed_run_numbers_them_behind_those_that_were_trained() -> None:
    leases = book(state=frontier_of(4, [(0, 3), (F, F + 5)]), attempt=1000)
    lease = leases.lease("a", 4)
    assert lease is not None and lease.sample_id == 3
    assert begun(leases, 3, attempt=1000).sample_id == F + 5
    assert leases.was_leased(F + 4)


# --- what is held -----------------------------------------------------------------------------------------------------


def end_of(assembler: Assembler, sample_id: int, further: tuple[int, ...] = (), **fields: object) -> None:
    """Three tokens that end a response."""
    listed = np.array(further, np.int64) if further else None
    held(assembler, sample_id, 3, "stop", further=listed, **fields)


def test_an_episode_has_ended_when_all_that_it_has_begun_has() -> None:
    assembler = Assembler()
    held(assembler, F + 1, 2, episode=0)
    end_of(assembler, 0, (F, F + 1))
    assert assembler.episode_of(0) is None
    end_of(assembler, F, episode=0)
    assert assembler.episode_of(0) is None
    held(assembler, F + 1, 4, "stop", episode=0)
    end_of(assembler, 1)
    assert [sample.sample_id for sample in assembler.episode_of(0) or ()] == [0, F, F + 1]
    assert [sample.sample_id for sample in assembler.episode_of(1) or ()] == [1]
    assert assembler.episode_of(2) is None
    assembler.take(assembler.samples[F])
    assert [sample.sample_id for sample in assembler.episode_of(0) or ()] == [0, F + 1]


def test_what_is_held_when_the_actor_dies_is_the_end() -> None:
    assembler = Assembler()
    held(assembler, F, 2, episode=0, actor=3)
    assert assembler.add(scored(F, 4, 6, episode=0)) is Verdict.EARLY
    assembler.mark(0, [OwedSample(F, 0, 6), OwedSample(F + 1, 0, 2)])
    assert not assembler.settled(0)
    for sample_id in (F, F + 1, F):
        assert assembler.give_up_attempt(sample_id, 0).complete
    assert assembler.settled(0)
    assert assembler.add(scored(F, 2, 4, episode=0)) is Verdict.STALE_ATTEMPT
    assert assembler.add(scored(F + 1, 0, 2, context=True, episode=0)) is Verdict.DUPLICATE
    assert (assembler.samples[F].finish, assembler.samples[F].reward) == ("failed", None)
    end_of(assembler, 0, (F + 1,), attempt=1)
    assert [sample.sample_id for sample in assembler.episode_of(0) or ()] == [0, F], "those of the dead attempt too"


def test_a_checkpoint_has_them_as_one_interval_and_nobody_goes_on_with_one() -> None:
    assembler = Assembler()
    held(assembler, 0, 4)
    assembler.take(assembler.samples[0])
    for sample_id in (F, F + 3):
        end_of(assembler, sample_id, episode=0)
        assembler.take(assembler.samples[sample_id])
    held(assembler, F + 4, 3, episode=0)
    assembler.take(assembler.samples[F + 4])
    held(assembler, F + 4, 5, episode=0)
    state = frontier.snapshot(assembler, 1)
    assert state.completed.tolist() == [[F, F + 5]]
    assert state.partial_ids.tolist() == [0]
    assert F + 4 not in assembler.completed, "the run goes on with it"
    again = frontier.restore(state, 1000)
    assert again.add(scored(F + 4, 3, 5, episode=0)) is Verdict.DUPLICATE
    assert frontier.snapshot(again, 1).completed.tolist() == [[F, F + 5]]


@pytest.mark.parametrize("policy", [WholeSamples(2), FilledSamples(2, 2)], ids=["whole", "filled"])
def test_a_step_of_samples_counts_episodes_and_takes_all_of_each(policy: WholeSamples | FilledSamples) -> None:
    assembler = Assembler()
    end_of(assembler, 0, (F,))
    end_of(assembler, 1, (F + 1,))
    end_of(assembler, F + 1, episode=1)
    assert policy.round(assembler, 0, 0).samples == [] and policy.ready_tokens(assembler, 0) == 0
    end_of(assembler, F, episode=0)
    found = policy.round(assembler, 0, 0)
    assert [sample.sample_id for sample in found.samples] == [0, F, 1, F + 1] and found.closes
    assert policy.ready_tokens(assembler, 0) == 12


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_a_group_compares_episodes_however_many_samples_each_has() -> None:
    section = AdvantageSection(estimator=Estimator.GRPO, normalize_std=False)
    outcomes = [Outcome(0, 1.0, 2), Outcome(0, 1.0, 1, further=True), Outcome(0, 1.0, 3, further=True)]
    outcomes += [Outcome(0, 0.0, 1), Outcome(0, None, 2, further=True), Outcome(0, 4.0, 1, further=True)]
    found = [values.tolist() for values in estimate(outcomes, section)]
    assert found == [[0.5, 0.5], [0.5], [0.5, 0.5, 0.5], [-0.5], [0.0, 0.0], [3.5]]
    stats = describe_rewards(outcomes)
    assert (stats["reward_mean"], stats["rewarded"], stats["unrewarded"]) == (0.5, 2, 0)
    flat = [Outcome(0, 1.0, 1), Outcome(0, 1.0, 1), Outcome(0, 9.0, 1, further=True)]
    assert flat_groups(flat) == 1.0 and [values.tolist() for values in estimate(flat, section)] == [[0.0]] * 3


def test_a_further_sample_is_of_its_episodes_group(tmp_path: Path) -> None:
    grouped = small_topology(tmp_path, "rollout.group_size=4")
    taken = [Taken(5, 0, True, None, 1.0), Taken(F + 9, 0, True, None, 1.0, episode=5)]
    assert give_advantages(taken, grouped) == [Outcome(1, 1.0, 0), Outcome(1, 1.0, 0, further=True)]


# --- random schedules -------------------------------------------------------------------------------------------------


class Alone(WholeSamples):
    """Takes leased samples and leaves the further ones of their episodes behind."""

    def choose(self, assembler: Assembler, version: int) -> list[Sample]:
        return [sample for sample in super().choose(assembler, version) if sample.episode is None]


class Apart(WholeSamples):
    """Takes further samples as soon as they have ended, whatever step their episode is of."""

    def choose(self, assembler: Assembler, version: int) -> list[Sample]:
        chosen = super().choose(assembler, version)
        others = [sample for sample in assembler.samples.values() if sample.episode is not None and sample.finish]
        return [*chosen, *(sample for sample in others if sample not in chosen)] if chosen else []


def caught(policy: type[WholeSamples]) -> list[BrokenInvariant]:
    found = []
    for seed in range(6):
        setup = Setup(2, TrainOn.SAMPLES, seed=seed, further=True)
        try:
            play(setup, random.Random(seed).randbytes(3000), policy(setup.samples_per_step))
        except BrokenInvariant as error:
            found.append(error)
    return found


def test_steps_that_leave_them_behind_or_tear_them_off_are_caught() -> None:
    assert any(isinstance(error, Deadlock) for error in caught(Alone))
    assert any("is trained without sample" in str(error) for error in caught(Apart))


def test_an_intake_that_waits_for_those_of_a_dead_actor_is_a_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    never_ends = Resumable(0, np.zeros(0, np.int32), complete=True)
    monkeypatch.setattr(Assembler, "_end_here", lambda *_: never_ends)
    with pytest.raises(Deadlock):
        for seed in range(25):
            play(Setup(1, seed=seed, further=True), random.Random(seed).randbytes(3000))


def test_dead_actors_leave_further_samples_that_end_before_their_time() -> None:
    """What the others prove is not empty: such samples are trained as far as they were held."""
    short = 0
    for seed in range(20):
        simulation = Simulation(Setup(1, seed=seed, further=True))
        simulation.run(random.Random(seed).randbytes(4000))
        simulation.finish()
        rows = [row for _, taken in simulation.oracle.steps for row in taken if row.gone]
        short += sum(row.end < simulation.oracle.length_of(row.sample_id) for row in rows)
    assert short > 3
