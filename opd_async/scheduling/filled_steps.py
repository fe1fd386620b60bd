"""Steps that are filled while they run: responses are trained as they end, and what the bound forces is cut last.

    step v opens -> part: ended responses -> part: ended responses -> ... -> last part: what is forced; v closes

A step is open as soon as its weights exist. Its parts are ended responses, the oldest token first, as they come; the
learner adds their gradients up. Responses that are still generated and hold a token of weights v - S or older have to
be in step v; they are cut in its last part, when the rest of the budget is full. Tokens get no older than with
`DeadlineCuts`, responses have a step more to end by themselves, and a step has one budget.

docs/staleness.md has the proof; `tests/core/test_staleness.py` drives the rule through random schedules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opd_async.scheduling.assembly import Assembler, Sample
from opd_async.scheduling.step_policy import Round

PARTS = 16
"""A part has a budget divided by so many tokens, or one response more; the last one has what is forced."""
FULL_NEXT_STEP = 1.0
"""Budgets that the step behind the open one may be bound to train; generation stands still beyond them."""
LARGEST_STEP = 1.2
"""Budgets that the open step has trained or is bound to train from which on it closes as soon as it can."""


@dataclass(frozen=True, slots=True)
class _View:
    """What is held, in untrained tokens: of responses that have ended, that are forced now, and that may still run."""

    ended: list[Sample]
    forced: list[Sample]
    free: list[Sample]

    @property
    def ended_tokens(self) -> int:
        return _tokens(self.ended)

    @property
    def forced_tokens(self) -> int:
        return _tokens(self.forced)


class FilledSteps:
    """Fill a step with responses as they end, and cut what the bound forces last.

    `max_staleness` None: nothing is forced, every response is trained whole.
    """

    def __init__(self, tokens_per_step: int, max_staleness: int | None) -> None:
        self.budget = tokens_per_step
        self.max_staleness = max_staleness

    def _due(self, version: int) -> int | None:
        """Weights whose tokens, and older ones, have to be trained by the step at `version`."""
        return None if self.max_staleness is None else version - self.max_staleness

    def _view(self, assembler: Assembler, version: int) -> _View:
        due, view = self._due(version), _View([], [], [])
        for sample in assembler.samples.values():
            if sample.finish is not None:
                view.ended.append(sample)
            elif sample.untrained_tokens:
                forced = due is not None and sample.oldest_version <= due
                (view.forced if forced else view.free).append(sample)
        view.ended.sort(key=_oldest_first)
        return view

    def ready_tokens(self, assembler: Assembler, version: int) -> int:
        """Untrained tokens that the step at `version` may train: of ended responses, and of those it has to cut."""
        view = self._view(assembler, version)
        return view.ended_tokens + view.forced_tokens

    def overfull(self, assembler: Assembler, version: int, taken: int | None) -> bool:
        """Whether the step at `version` + 1 would have to be too large, were the open one to close with a budget.

        Not where that step's tokens are all there: those of responses that have ended, while what is generated now is
        for a later one. Then generation adds nothing to it.
        """
        due = self._due(version + 1)
        if due is None:
            return False
        room = 0 if taken is None else max(self.budget - taken, 0)
        bound = [s for s in assembler.samples.values() if s.untrained_tokens and s.oldest_version <= due]
        grows = due >= version or any(sample.finish is None for sample in bound)
        return grows and _tokens(bound) - room >= FULL_NEXT_STEP * self.budget

    def _too_large(self, assembler: Assembler, view: _View, version: int, taken: int) -> bool:
        """Whether the step could close, and what it has to train is too much already: it grows until it does.

        Not at S = 0, where a step that closes has generation stand still.
        """
        due = self._due(version)
        if due is None or self.max_staleness == 0 or not assembler.settled(due):
            return False
        ended = _tokens(sample for sample in view.ended if sample.untrained_tokens and sample.oldest_version <= due)
        return taken + view.forced_tokens + ended >= LARGEST_STEP * self.budget

    def round(self, assembler: Assembler, version: int, taken: int) -> Round:
        """The next part of the step at `version`, which has trained `taken` tokens so far."""
        part = max(1, self.budget // PARTS)
        view = self._view(assembler, version)
        room = self.budget - taken - view.forced_tokens
        enough = view.ended_tokens >= room
        if not self._too_large(assembler, view, version, taken) and (room > part or not enough):
            found = _fill(view.ended, part) if room > part else []
            if not found and self.overfull(assembler, version, taken):
                # generation stands still, so that nothing else will end: cut what the next step would have to
                found = _fill(sorted(view.free, key=_oldest_first), min(part, room))
            return Round(found)
        due = self._due(version)
        if due is not None and not assembler.settled(due):
            return Round([], drain=self.max_staleness == 0)
        return Round([*view.forced, *_fill(view.ended, room, due)], closes=True)


def _tokens(samples: Iterable[Sample]) -> int:
    return sum(sample.untrained_tokens for sample in samples)


def _oldest_first(sample: Sample) -> tuple[int, int]:
    """An empty response costs nothing and goes first."""
    return (sample.oldest_version if sample.untrained_tokens else -1, sample.order)


def _fill(samples: Sequence[Sample], room: int, due: int | None = None) -> list[Sample]:
    """The first samples until they have `room` tokens, and all with a token of weights `due` or older."""
    chosen: list[Sample] = []
    tokens = 0
    for sample in samples:
        if sample.untrained_tokens and tokens >= room and (due is None or sample.oldest_version > due):
            break
        chosen.append(sample)
        tokens += sample.untrained_tokens
    return chosen
