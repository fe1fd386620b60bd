"""Leases: order, admission, deaths, and that no sample is leased twice or skipped."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_chunks import frontier_of

from opd_async.config.topology import ScheduleSection, StepRule, TrainOn
from opd_async.scheduling import frontier
from opd_async.scheduling.admission import Admission, Flow
from opd_async.scheduling.leases import LeaseBook, LeaseSpec, PromptOrder, admission_of
from opd_async.transport.messages import Frontier

NOTHING = np.zeros(0, np.int32)
ORDER = PromptOrder(100, 1, 0, shuffle=False)


def book(
    slots: int = 100,
    state: Frontier | None = None,
    train_on: TrainOn = TrainOn.TOKENS,
    max_staleness: int = 1,
    attempt: int = 0,
) -> LeaseBook:
    schedule = ScheduleSection(
        steps=1,
        train_on=train_on,
        rule=StepRule.DEADLINE,
        tokens_per_step=10,
        samples_per_step=4,
        max_staleness=max_staleness,
    )
    return LeaseBook(state or frontier.empty(0), ORDER, admission_of(schedule), slots, attempt)


def leased(leases: LeaseBook, version: int = 0, actor: str = "a") -> list[int]:
    """Ids of all that admission gives out now."""
    ids = []
    while (spec := leases.lease(actor, version)) is not None:
        ids.append(spec.sample_id)
    return ids


def lease(leases: LeaseBook, actor: str = "a") -> LeaseSpec:
    spec = leases.lease(actor, 0)
    assert spec is not None
    return spec


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_without_a_bound_responses_begin_whatever_their_step_is() -> None:
    rule = admission_of(ScheduleSection(steps=1, rule=StepRule.FILLED, tokens_per_step=100, max_staleness=None))
    rule.closed(200, 0.0)  # no step can be too large where nothing is forced
    rule.opened(99, False)
    flow = Flow(sample_id=0, version=0, waiting_tokens=24, generating=4, slots=8)
    assert rule.admits(flow) and not rule.admits(replace(flow, waiting_tokens=25))
    for change in ({"rule": StepRule.DEADLINE}, {"train_on": TrainOn.SAMPLES}):
        with pytest.raises(ValueError, match="max_staleness: null"):
            admission_of(ScheduleSection(steps=1, max_staleness=None).model_copy(update=change))


def test_every_epoch_uses_every_prompt_once_per_member_of_a_group() -> None:
    order = PromptOrder(7, 3, seed=5, shuffle=True)
    epochs = [[order.prompt_of(epoch * 21 + i) for i in range(21)] for epoch in range(3)]
    for prompts in epochs:
        assert sorted(prompts) == sorted([*range(7)] * 3)
        assert all(len(set(prompts[i : i + 3])) == 1 for i in range(0, 21, 3)), "a group has one prompt"
    assert epochs[0] != epochs[1]


def test_the_order_depends_on_seed_and_sample_alone() -> None:
    order, again = PromptOrder(50, 2, 1, True), PromptOrder(50, 2, 1, True)
    forwards = [order.prompt_of(sample_id) for sample_id in range(300)]
    backwards = [again.prompt_of(sample_id) for sample_id in reversed(range(300))]
    assert forwards == backwards[::-1]
    assert forwards != [PromptOrder(50, 2, 2, True).prompt_of(sample_id) for sample_id in range(300)]
    assert [PromptOrder(5, 2, 1, False).prompt_of(i) for i in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0]


# --- admission -------------------------------------------------------------------------------------------------------


def test_slots_bound_what_is_generated_at_once() -> None:
    leases = book(slots=3)
    assert leased(leases) == [0, 1, 2]
    assert leases.generating == leases.generating_by("a") == leases.active == 3
    leases.ended(1, attempt=0, response_tokens=5)
    assert leases.generating == 2
    assert leases.active == 3
    assert leased(leases) == [3]


def test_untrained_finished_tokens_hold_new_leases_back() -> None:
    leases = book(slots=4, max_staleness=2)
    assert leased(leases) == [0, 1, 2, 3]
    leases.ended(0, attempt=0, response_tokens=12)
    assert leased(leases) == [4]
    leases.ended(1, attempt=0, response_tokens=8)
    assert leases.waiting_tokens == 20
    assert leased(leases) == []
    leases.trained(0, end=12, complete=True)
    assert leases.waiting_tokens == 8
    assert leased(leases) == [5]


@pytest.mark.parametrize(("max_staleness", "tokens"), [(1, 11), (2, 13)])
def test_a_full_next_step_holds_new_leases_back_while_a_step_is_trained(max_staleness: int, tokens: int) -> None:
    leases = book(slots=4, max_staleness=max_staleness)
    lease(leases)
    leases.admission.ready(1, tokens - 1)
    lease(leases)
    leases.admission.ready(1, tokens)
    assert leased(leases) == []
    leases.admission.ready(0, tokens)  # no step is trained: a new response may be what the next one waits for
    assert leased(leases) == [2, 3]


def test_a_cut_counts_as_trained_before_and_after_the_end() -> None:
    leases = book()
    lease(leases)
    leases.trained(0, end=6, complete=False)
    leases.ended(0, attempt=0, response_tokens=10)
    assert leases.waiting_tokens == 4
    leases.trained(0, end=10, complete=True)
    assert leases.waiting_tokens == 0
    assert leases.active == 0


def test_news_may_come_in_any_order() -> None:
    leases = book()
    lease(leases)
    leases.trained(0, end=10, complete=True)
    leases.ended(0, attempt=0, response_tokens=10)
    leases.ended(0, attempt=0, response_tokens=10)
    leases.give_back(0, 1, NOTHING, False)
    assert (leases.active, leases.generating, leases.waiting_tokens) == (0, 0, 0)
    assert lease(leases).sample_id == 1


def test_whole_samples_are_admitted_by_the_version_that_generates_them() -> None:
    leases = book(train_on=TrainOn.SAMPLES, max_staleness=1)
    assert leased(leases, version=0) == list(range(8))
    assert leased(leases, version=1) == list(range(8, 12))
    on_policy = book(train_on=TrainOn.SAMPLES, max_staleness=0)
    assert leased(on_policy, version=0) == list(range(4))


# --- deaths ----------------------------------------------------------------------------------------------------------


def test_a_given_back_sample_goes_first_and_behind_its_prefix() -> None:
    leases = book(slots=3)
    assert leased(leases) == [0, 1, 2]
    assert [spec.sample_id for spec in leases.held_by("a")] == [0, 1, 2]
    leases.give_back(1, 1, np.array([4, 5], np.int32), False)
    assert leases.generating_by("a") == 2
    spec = lease(leases, "b")
    assert (spec.sample_id, spec.attempt, spec.prefix.tolist()) == (1, 1, [4, 5])
    assert spec.prompt_index == ORDER.prompt_of(1)
    assert [spec.sample_id for spec in leases.held_by("b")] == [1]
    leases.ended(1, attempt=0, response_tokens=9)
    assert leases.generating_by("b") == 1, "the old attempt cannot end the new one"
    leases.ended(1, attempt=1, response_tokens=9)
    assert leases.generating_by("b") == 0


def test_asking_twice_gives_back_once() -> None:
    leases = book(slots=2)
    assert leased(leases) == [0, 1]
    leases.give_back(0, 1, NOTHING, False)
    leases.give_back(0, 1, NOTHING, False)
    assert lease(leases, "b").attempt == 1
    leases.give_back(0, 1, NOTHING, False)
    assert leases.generating_by("b") == 1
    assert leases.lease("c", 0) is None


def test_a_complete_response_of_a_dead_actor_waits_for_its_training() -> None:
    leases = book(slots=1)
    lease(leases)
    leases.trained(0, end=2, complete=False)
    leases.give_back(0, 0, NOTHING, True)
    assert leases.generating == 0
    assert leases.active == 1
    leases.trained(0, end=9, complete=True)
    assert (leases.active, leases.waiting_tokens) == (0, 0)


def test_a_cut_while_nobody_generates_counts() -> None:
    """Or its tokens would hold admission back for ever."""
    leases = book()
    lease(leases)
    leases.give_back(0, 1, np.zeros(30, np.int32), False)
    leases.trained(0, end=30, complete=False)
    assert lease(leases, "b").sample_id == 0
    leases.ended(0, attempt=1, response_tokens=31)
    assert leases.waiting_tokens == 1


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_with_what_was_not_completed() -> None:
    leases = book(slots=5, state=frontier_of(3, [(0, 2), (4, 6)], {3: [7, 8], 6: [9]}), attempt=1000)
    specs = [lease(leases) for _ in range(5)]
    assert [spec.sample_id for spec in specs] == [3, 6, 2, 7, 8]
    assert [spec.prefix.tolist() for spec in specs] == [[7, 8], [9], [], [], []]
    assert {spec.attempt for spec in specs} == {1000}
    leases.ended(3, attempt=1000, response_tokens=5)
    assert leases.waiting_tokens == 3


@settings(max_examples=150, deadline=None)
@given(
    st.sets(st.integers(0, 20), max_size=12),
    st.lists(st.tuples(st.sampled_from("letcg"), st.integers(0, 30), st.integers(0, 6)), max_size=80),
)
def test_counters_and_ids_stay_right(completed: set[int], moves: list[tuple[str, int, int]]) -> None:
    """Against a model: no sample is leased while it is out, none comes back once complete, counts add up."""
    leases = book(slots=6, state=frontier_of(0, [(one, one + 1) for one in sorted(completed)]))
    out: dict[int, tuple[str, int]] = {}
    returned: dict[int, int] = {}
    trained: dict[int, int] = {}
    ended: dict[int, int] = {}
    done = set(completed)
    for move, pick, number in moves:
        if move == "l":
            actor = f"actor-{number % 2}"
            spec = leases.lease(actor, 0)
            if spec is None:
                continue
            assert spec.sample_id not in out
            assert spec.sample_id not in done
            assert spec.attempt == returned.pop(spec.sample_id, 0)
            out[spec.sample_id] = (actor, spec.attempt)
        elif not out:
            continue
        else:
            sample_id = sorted(out)[pick % len(out)]
            _, attempt = out[sample_id]
            end = trained.get(sample_id, 0) + number
            if move == "e" and sample_id not in ended:
                leases.ended(sample_id, attempt=attempt, response_tokens=end)
                ended[sample_id] = end
            elif move == "t" and sample_id not in ended:
                leases.trained(sample_id, end=end, complete=False)
                trained[sample_id] = end
            elif move == "c" and sample_id in ended:
                leases.trained(sample_id, end=ended.pop(sample_id), complete=True)
                done.add(sample_id)
                del out[sample_id]
            elif move == "g" and sample_id not in ended:
                leases.give_back(sample_id, attempt + 1, NOTHING, False)
                returned[sample_id] = attempt + 1
                del out[sample_id]
        assert leases.active == len(out)
        assert leases.generating == len(out) - len(ended)
        for actor in ("actor-0", "actor-1"):
            mine = [one for one, (owner, _) in out.items() if owner == actor]
            assert leases.generating_by(actor) == len([one for one in mine if one not in ended])
            assert sorted(spec.sample_id for spec in leases.held_by(actor)) == sorted(mine)
        assert leases.waiting_tokens == sum(end - trained.get(one, 0) for one, end in ended.items())


def test_admission_is_told_the_mean_length_of_what_has_ended() -> None:
    class Told:
        """A rule that remembers what it was told."""

        means: ClassVar[list[float]] = []

        def admits(self, flow: Flow) -> bool:
            self.means.append(flow.mean_tokens)
            return True

    leases = LeaseBook(frontier.empty(0), ORDER, cast(Admission, Told()), slots=400, longest=100)
    leases.lease("a", 0)
    for sample_id, tokens in enumerate((20, 276, 34)):
        leases.ended(sample_id, attempt=0, response_tokens=tokens)
        leases.lease("a", 0)
    assert Told.means == [100.0, 20.0, 148.0, 110.0], "the plain mean: one short response is not the mean of hundreds"
    for sample_id in range(3, 300):
        leases.ended(sample_id, attempt=0, response_tokens=110)
        leases.lease("a", 0)
    leases.ended(300, attempt=0, response_tokens=366)
    leases.lease("a", 0)
    assert Told.means[-2:] == pytest.approx([110.0, 111.0]), "and later the lengths of the last 256 or so"
