"""Decide whether another response may begin: pure rules, one for each way of making steps.

    LeaseBook -> Flow -> admits?      what the intake tells: `ready`, `opened`, `closed`

Nothing is thrown away for its age, so what holds the rollout back is here: too many responses at once would make steps
too large, or too old, or would have to be cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

FULL_STEP = 1.25
"""Budgets that the next step may hold while a step is trained; no new response begins beyond them."""
FULL_STEP_AT_S1 = 1.1
"""The same for `max_staleness: 1`, where the next step must also take the tokens that are still being generated, and so
ends up about twice as large."""


def bound_of(max_staleness: int | None) -> int:
    """The bound of a rule that cannot do without one. `ValueError` if there is none: such topologies are refused."""
    if max_staleness is None:
        raise ValueError("schedule.max_staleness: null needs rule: filled with train_on: tokens")
    return max_staleness


def close_early_tokens(tokens_per_step: int, max_staleness: int) -> int:
    """Deadline cuts: return how many tokens the next step may hold before the barrier closes early.

    A safety limit; admission normally keeps the next step far below it. Do not lower it: paused engines lose time, and
    their responses are cut anyway (bench/LOG.md).
    """
    return (2 * max(1, max_staleness) + 1) * tokens_per_step


WAITING = 0.7
"""Budgets of ended, untrained tokens beyond which no response begins (filled steps)."""
WAITING_UNCUT = 0.25
"""The same where nothing is ever cut: waiting makes tokens older, and saves no work."""
STARVED = 0.15
"""Share of a step for which the learner has waited although tokens that waited had held responses back before: from
there on responses are paced."""
PACED = 8
"""Steps for which they are, behind the last such one."""
FEWEST = 0.25
"""Share of the slots below which a learner without work lets responses begin, whatever `Front` says: a step that waits
for few responses would wait long, with none for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """The state of a lease book when it is asked for one more: `sample_id` would begin under weights `version`."""

    sample_id: int
    version: int
    waiting_tokens: int
    """Untrained tokens of responses that have ended."""
    generating: int
    slots: int
    away: int = 0
    """Responses that have not ended and are not generated: their episodes wait for tools."""
    mean_tokens: float = 0.0
    """Mean length of the responses that have ended lately, or what is taken for it before one has."""


class Admission(Protocol):
    """A rule, and what it may want to know."""

    def admits(self, flow: Flow) -> bool:
        """Whether the response may begin."""

    def ready(self, next_step: int, tokens: int) -> None:
        """The step that starts from weights `next_step` could train `tokens` if it began now."""

    def opened(self, taken: int, idle: bool) -> None:
        """The open step has taken so many tokens; `idle`: the learner waits for more."""

    def held(self) -> None:
        """Generation stands still until the next update, lest the next step become too large."""

    def closed(self, tokens: int, waited: float) -> None:
        """A step has closed with `tokens`; the learner waited for responses for a share `waited` of it."""


class _Deaf:
    """Wants to know nothing."""

    def ready(self, next_step: int, tokens: int) -> None:
        """Ignored."""

    def opened(self, taken: int, idle: bool) -> None:
        """Ignored."""

    def held(self) -> None:
        """Ignored."""

    def closed(self, tokens: int, waited: float) -> None:
        """Ignored."""


class SampleAdmission(_Deaf):
    """`train_on: samples`: a response begins only so far ahead of its step that its tokens cannot get too old."""

    def __init__(self, samples_per_step: int, max_staleness: float) -> None:
        self._samples_per_step = samples_per_step
        self._max_staleness = max_staleness

    def admits(self, flow: Flow) -> bool:
        """Sample n begins under weights >= n / samples_per_step - S - 1 (docs/staleness.md)."""
        return flow.sample_id < (flow.version + self._max_staleness + 1) * self._samples_per_step


class DeadlineAdmission(_Deaf):
    """Deadline cuts: not while ended responses hold max(1, S) budgets, nor while the next step is full already."""

    def __init__(self, budget: int, max_staleness: int) -> None:
        self._budget = budget
        self._max_staleness = max_staleness
        self._ready = (-1, 0)

    def ready(self, next_step: int, tokens: int) -> None:
        """Remembered until the next account."""
        self._ready = (next_step, tokens)

    def admits(self, flow: Flow) -> bool:
        """While no step is trained, a new response may be what the next one waits for."""
        limit = FULL_STEP_AT_S1 if self._max_staleness == 1 else FULL_STEP
        if self._ready[0] == flow.version + 1 and self._ready[1] >= limit * self._budget:
            return False
        return flow.waiting_tokens < max(1, self._max_staleness) * self._budget


class Front:
    """How much of a step may be taken before no more responses begin, in budgets.

    What begins just after an update has the longest time to end by itself. The front starts at 1 and comes down by as
    much as a step came out too large, and a little when generation had to stand still lest the next one do. It goes up
    slowly while the learner waits for responses, but not at once after a step that was too large: such a step cuts
    more, so that the next ones find few responses under way. A step for which the learner waited may be a little too
    large: its last response or its last score made it so, and fewer responses would make it later.
    """

    LOWEST = 0.2
    TOO_LARGE = 1.02
    """Budgets of a step from which on the front comes down."""
    FAR_TOO_LARGE = 1.1
    """The same at a bound of one step or none of age, where the learner has waited; it comes down by what is beyond."""
    LARGEST_MOVE = 0.3
    """Budgets by which it comes down at most; at least by `UP`."""
    HELD = 0.1
    """Budgets by which it comes down at least, if generation stood still."""
    WAITED = 0.015
    """Share of a step's time from which on the front goes up."""
    UP = 0.03
    UP_SHARE = 0.2
    """It goes up by so much of the share that the learner waited, at least by `UP`."""
    CALM = 2
    """Steps since the last one that was too large, after which it may go up."""

    def __init__(self, max_staleness: int | None) -> None:
        self.budgets = 1.0
        # a larger bound has later steps for what is too much
        self._far_too_large = math.inf if max_staleness is None or max_staleness > 1 else self.FAR_TOO_LARGE
        self._calm = 0

    def closed(self, size: float, waited: float, held: bool = False) -> None:
        """A step of `size` budgets has closed; the learner waited for a share `waited` of its time.

        `held`: generation stood still during it.
        """
        large, right = (self.TOO_LARGE, 1.0) if waited <= self.WAITED else (self._far_too_large,) * 2
        if held or size > large:
            self._calm = 0
            self.budgets -= min(max(size - right, self.HELD if held else self.UP), self.LARGEST_MOVE)
        else:
            self._calm += 1
            if waited > self.WAITED and self._calm > self.CALM:
                self.budgets += max(self.UP, self.UP_SHARE * waited)
        self.budgets = min(max(self.budgets, self.LOWEST), 1.0)


class FilledAdmission(_Deaf):
    """Filled steps: not while ended responses wait, nor once the open step has taken its front.

    Nor beyond what the bound leaves room for: what is under way when a step opens has to be trained in it and the
    `max_staleness` steps behind it. That matters where the slots hold more than a budget of responses.

    Responses of one length that have begun together end together. Then budgets of them wait at once, no other begins
    until most are trained, and all begin together again when the learner has next to no work left. Where the learner
    has starved so, responses are *paced*: one may begin for each one's worth of tokens that is trained, however much
    waits, as if a slot were taken until its tokens are trained. They then begin and end one after the other.
    """

    def __init__(self, budget: int, max_staleness: int | None) -> None:
        """`max_staleness` None: nothing is ever cut, and no token too old."""
        self.front = Front(max_staleness)
        self._budget = budget
        self._bounded = max_staleness is not None
        self._room = math.inf if max_staleness is None else (max(max_staleness, 1) + 1) * budget
        self._waiting = WAITING if self._bounded else WAITING_UNCUT
        self._taken, self._idle = 0, True
        self._held = False
        self._turned_away, self._paced = False, 0

    def opened(self, taken: int, idle: bool) -> None:
        """Remembered until the next account."""
        self._taken, self._idle = taken, idle

    def held(self) -> None:
        """Remembered until the step has closed."""
        self._held = True

    def closed(self, tokens: int, waited: float) -> None:
        """The front learns from it, unless nothing is ever cut: then no step can be too large."""
        self._taken, self._idle = 0, True
        if self._bounded:
            self.front.closed(tokens / self._budget, waited, self._held)
        self._held = False
        self._paced = max(self._paced - 1, 0)
        if waited > STARVED:
            if self._turned_away:
                self._paced = PACED
            self._turned_away = False

    def admits(self, flow: Flow) -> bool:
        """By the front while the learner is busy; a learner that waits keeps some responses under way."""
        responses = flow.generating + flow.away
        if flow.waiting_tokens >= self._waiting * self._budget:
            self._turned_away = True
            slots_taken = flow.waiting_tokens + (responses + 1) * flow.mean_tokens
            if not self._paced or slots_taken > flow.slots * flow.mean_tokens:
                return False
        under_way = self._taken + flow.waiting_tokens + responses * flow.mean_tokens
        if self._taken <= self.front.budgets * self._budget and under_way < self._room:
            return True
        return self._idle and flow.generating < FEWEST * flow.slots
