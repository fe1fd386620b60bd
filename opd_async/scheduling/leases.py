"""Which sample is generated next, by whom, and how many may be in flight: pure.

Sample n belongs to prompt `order[n // group_size]` of its epoch; the order of an epoch is a permutation drawn from
(seed, epoch). So the samples that a frontier does not list as completed are all that a resumed run needs to know.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_async.config.topology import ScheduleSection, StepRule, TrainOn
from opd_async.scheduling.admission import (
    Admission,
    DeadlineAdmission,
    FilledAdmission,
    Flow,
    SampleAdmission,
    bound_of,
)
from opd_async.scheduling.frontier import given_of
from opd_async.scheduling.further import FURTHER_IDS, MAX_FURTHER, is_further
from opd_async.scheduling.intervals import IntervalSet
from opd_async.scheduling.routing import Deal
from opd_async.transport.messages import Frontier


@dataclass(frozen=True, slots=True)
class LeaseSpec:
    """What to generate. `prefix` int32[k]: response tokens that are scored already."""

    sample_id: int
    attempt: int
    prompt_index: int
    prefix: NDArray[np.int32]
    episode: int | None = None
    """Of a further sample: the leased one whose episode has begun it."""


class _Trained(NamedTuple):
    """How far a sample is trained: response positions before `end`, of which `tokens` were sampled."""

    end: int = 0
    tokens: int = 0


@dataclass(slots=True, kw_only=True)
class _Active:
    """A sample between its lease and its last trained token."""

    spec: LeaseSpec
    actor: str
    trained: _Trained
    response_tokens: int | None = None
    """Sampled tokens of the response, known once it has ended."""
    away: bool = False
    """Its episode waits for a tool: it generates, but needs no slot."""
    further: int = 0
    """Further samples that its episode has begun."""


class PromptOrder:
    """sample -> prompt, for ever: epoch after epoch over `prompts` prompts."""

    def __init__(self, prompts: int, group_size: int, seed: int, shuffle: bool) -> None:
        self._prompts = prompts
        self._group_size = group_size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order: NDArray[np.int64] = np.zeros(0, np.int64)

    def prompt_of(self, sample_id: int) -> int:
        """Index of the sample's prompt."""
        epoch, position = divmod(sample_id // self._group_size, self._prompts)
        if not self._shuffle:
            return position
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self._seed, epoch)).permutation(self._prompts)
        return int(self._order[position])


UNDER_WAY = 4
"""Responses for each slot that may be under way, those that wait for tools included."""
LENGTH_SHARE = 1 / 256
"""Weight of each new response in their mean length, which changes while the student learns."""


def admission_of(schedule: ScheduleSection) -> Admission:
    """The rule that the topology asks for."""
    if schedule.train_on is TrainOn.SAMPLES:
        return SampleAdmission(schedule.samples_per_step, bound_of(schedule.max_staleness))
    if schedule.step_rule is StepRule.FILLED:
        return FilledAdmission(schedule.tokens_per_step, schedule.max_staleness)
    return DeadlineAdmission(schedule.tokens_per_step, bound_of(schedule.max_staleness))


class LeaseBook:
    """All leases of a run.

        new --lease--> generating --ended--> waiting for training --trained(complete)--> completed
         ^                 |
         +---- returned <--+  give_back: its actor died

    A sample may be trained in parts at any time. News of an attempt that was given up changes nothing.

    At most `slots` responses are generated at once, and `UNDER_WAY` times as many are under way, those included whose
    episode waits for a tool; whether one more may begin is a matter of the `admission` rule. A further sample of an
    episode takes a slot while it is generated, and is not asked whether it may: what has begun must come to its end.
    """

    def __init__(
        self,
        frontier: Frontier,
        order: PromptOrder,
        admission: Admission,
        slots: int,
        attempt: int = 0,
        longest: int = 0,
    ) -> None:
        """`longest` tokens are taken for the mean length of responses until the first one has ended."""
        self.admission = admission
        self._order = order
        self._slots = slots
        self._attempt = attempt
        self._next = 0
        self._completed = IntervalSet.from_array(frontier.completed)
        self._next_further = self._completed.first_absent(FURTHER_IDS)
        self._returned: deque[LeaseSpec] = deque()
        self._active: dict[int, _Active] = {}
        self._generating: Counter[str] = Counter()
        self._away = 0
        self._further_generating = 0
        self._waiting_tokens = 0
        self._mean_tokens, self._ended = float(longest), 0
        self._trained: dict[int, _Trained] = {}
        self._deal = Deal()
        parts = np.split(frontier.partial_tokens, np.cumsum(frontier.partial_ends)[:-1])
        given = given_of(frontier).tolist()
        for sample_id, tokens, among in zip(frontier.partial_ids.tolist(), parts, given, strict=False):
            self._returned.append(LeaseSpec(sample_id, attempt, order.prompt_of(sample_id), tokens))
            self._trained[sample_id] = _Trained(len(tokens), len(tokens) - among)

    def resize(self, slots: int) -> None:
        """Have so many slots from now on; responses under way go on."""
        self._slots = slots

    @property
    def generating(self) -> int:
        """Responses that have not ended and are not away."""
        return self._generating.total() - self._away + self._further_generating

    def generating_by(self, actor: str) -> int:
        """Leased responses of one actor that have not ended."""
        return self._generating[actor]

    @property
    def active(self) -> int:
        """Samples between their lease and their last trained token."""
        return len(self._active)

    @property
    def waiting_tokens(self) -> int:
        """Sampled tokens of responses that have ended which no step has trained."""
        return self._waiting_tokens

    def lease(self, actor: str, version: int) -> LeaseSpec | None:
        """The next sample for `actor`, or None while admission holds it back; `version` is what the engines hold."""
        if self.generating >= self._slots or self._generating.total() >= UNDER_WAY * self._slots:
            return None
        if self._returned:
            spec = self._returned.popleft()
        else:
            sample_id = self._first_unleased()
            flow = Flow(
                sample_id=sample_id,
                version=version,
                waiting_tokens=self.waiting_tokens,
                generating=self.generating,
                slots=self._slots,
                away=self._away,
                mean_tokens=self._mean_tokens,
            )
            if not self.admission.admits(flow):
                return None
            spec = LeaseSpec(sample_id, self._attempt, self._order.prompt_of(sample_id), np.zeros(0, np.int32))
            self._next = sample_id + 1
        self._active[spec.sample_id] = _Active(
            spec=spec, actor=actor, trained=self._trained.pop(spec.sample_id, _Trained())
        )
        self._generating[actor] += 1
        return spec

    def route(self, spec: LeaseSpec, teachers: Collection[int]) -> int:
        """Which of the teacher actors `teachers` scores a sample that was leased; the same one for all its attempts, if
        it stays among them, and for all samples of its prompt that are under way."""
        return self._deal.of(spec.sample_id, spec.prompt_index, teachers)

    def further(self, sample_id: int, attempt: int, actor: str) -> LeaseSpec | None:
        """A sample for another conversation of the episode of `sample_id`; None if `actor` does not run it, or it has
        `MAX_FURTHER` of them."""
        first = self._active.get(sample_id)
        if first is None or (first.actor, first.spec.attempt) != (actor, attempt) or first.spec.episode is not None:
            return None
        if first.response_tokens is not None or first.further >= MAX_FURTHER:
            return None
        first.further += 1
        spec = LeaseSpec(self._next_further, attempt, first.spec.prompt_index, np.zeros(0, np.int32), sample_id)
        self._next_further += 1
        self._active[spec.sample_id] = _Active(spec=spec, actor=actor, trained=_Trained())
        self._further_generating += 1
        return spec

    def unused(self, sample_id: int, attempt: int) -> None:
        """A further sample has not begun, and will not."""
        active = self._active.get(sample_id)
        if active is not None and active.spec.episode is not None and active.spec.attempt == attempt:
            self._remove(active)

    def _first_unleased(self) -> int:
        sample_id = self._completed.first_absent(self._next)
        while sample_id in self._active or sample_id in self._trained:
            sample_id = self._completed.first_absent(sample_id + 1)
        return sample_id

    def away(self, sample_id: int, attempt: int, away: bool) -> None:
        """The episode of a response waits for its own code, or the student goes on with it."""
        active = self._active.get(sample_id)
        if active is not None and active.spec.attempt == attempt and active.response_tokens is None:
            if active.spec.episode is None:
                self._away += away - active.away
            else:
                self._further_generating -= away - active.away
            active.away = away

    def _stops(self, active: _Active) -> None:
        """A response is not generated any more."""
        if active.spec.episode is None:
            self._generating[active.actor] -= 1
            self._away -= active.away
        else:
            self._further_generating -= not active.away
        active.away = False
        self._deal.ended(active.spec.sample_id)

    def ended(self, sample_id: int, attempt: int, response_tokens: int) -> None:
        """The response is complete, with so many sampled tokens (it may not be scored yet)."""
        active = self._active.get(sample_id)
        if active is not None and active.spec.attempt == attempt and active.response_tokens is None:
            self._stops(active)
            active.response_tokens = response_tokens
            self._waiting_tokens += response_tokens - active.trained.tokens
            self._ended += 1
            # the first to end are the short ones: the plain mean until there are enough of them
            self._mean_tokens += max(LENGTH_SHARE, 1 / self._ended) * (response_tokens - self._mean_tokens)

    def trained(self, sample_id: int, end: int, complete: bool, given: int = 0) -> None:
        """A step has taken the sample's tokens before `end`, of which `given` were not sampled."""
        now = _Trained(end, end - given)
        if complete:
            self._completed.add(sample_id)
            self._deal.forget(sample_id)
        active = self._active.get(sample_id)
        if active is None:
            if sample_id in self._trained and not complete:
                self._trained[sample_id] = now
            return
        if active.response_tokens is not None:
            self._waiting_tokens -= now.tokens - active.trained.tokens
        active.trained = now
        if complete:
            self._remove(active)

    def _remove(self, active: _Active) -> None:
        if active.response_tokens is None:
            self._stops(active)
        else:
            self._waiting_tokens -= active.response_tokens - active.trained.tokens
        del self._active[active.spec.sample_id]

    def holder(self, sample_id: int) -> str | None:
        """The actor that a sample is leased to; None if it is leased to nobody."""
        active = self._active.get(sample_id)
        return None if active is None else active.actor

    def attempt_of(self, sample_id: int) -> int | None:
        """The newest attempt of a sample that is leased or was given back; None for any other."""
        active = self._active.get(sample_id)
        if active is not None:
            return active.spec.attempt
        return next((spec.attempt for spec in self._returned if spec.sample_id == sample_id), None)

    def was_leased(self, sample_id: int) -> bool:
        """Whether a sample has ever been leased, in this launch or before its checkpoint."""
        if is_further(sample_id):
            return sample_id < self._next_further
        known = sample_id in self._active or sample_id in self._trained or sample_id in self._completed
        return known or sample_id < self._next

    def is_completed(self, sample_id: int) -> bool:
        """Whether all of a sample is trained."""
        return sample_id in self._completed

    def trained_end(self, sample_id: int) -> int:
        """Response tokens of a sample that are trained, as long as it is not completed."""
        active = self._active.get(sample_id)
        return active.trained.end if active is not None else self._trained.get(sample_id, _Trained()).end

    def held_by(self, actor: str) -> list[LeaseSpec]:
        """Leases of an actor whose responses or chunks may be lost with it."""
        return [active.spec for active in self._active.values() if active.actor == actor]

    def give_back(self, sample_id: int, attempt: int, prefix: NDArray[np.int32], complete: bool) -> None:
        """The sample's actor is gone: lease it again behind `prefix`, unless all of it is scored already.

        A further one ends there: its episode, begun anew, begins others.
        """
        active = self._active.get(sample_id)
        if active is None:
            return
        if active.spec.episode is not None:
            self._remove(active)
            return
        if complete:
            # the learner holds all of it; its exact length no longer matters to admission
            self.ended(sample_id, active.spec.attempt, active.trained.tokens)
            return
        if active.spec.attempt >= attempt:  # asked twice: it has been leased again already
            return
        self._remove(active)
        self._trained[sample_id] = active.trained
        self._returned.append(LeaseSpec(sample_id, attempt, active.spec.prompt_index, prefix))
