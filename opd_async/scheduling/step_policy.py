"""When a step is taken and what it trains: pure policies over an `Assembler`.

A token made by weights b and trained at version v has staleness v - b. `DeadlineCuts` keeps it at most S:

- *forced*: at version v, every token made by weights v - S or older is trained now, because at v + 1 it would be too
  old; a response still being generated is cut there. The step waits until all such tokens are here (`settled`).
- *finished*: complete responses, oldest token first, until the step has `LARGEST_STEP` budgets. A step starts with one
  budget, so it is larger only when the learner is behind; then larger steps mean fewer of them, and fewer cuts.

docs/staleness.md has the proof; `tests/core/test_staleness.py` drives both policies through random schedules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from opd_async.scheduling.admission import close_early_tokens
from opd_async.scheduling.assembly import Assembler, Sample

LARGEST_STEP = 2
"""Budgets that finished responses may fill; what the deadlines force has no limit."""


@dataclass(frozen=True, slots=True)
class Round:
    """What a policy decides when the learner has nothing to do: nothing yet, or the next part of the open step.

    `samples` go to the learner now. `closes`: the step ends with them, and the weights with it; a step of one part
    closes at once. `drain`: generation must stop before the step can close.
    """

    samples: list[Sample]
    closes: bool = False
    drain: bool = False


class StepPolicy(Protocol):
    """Chooses what a step is made of."""

    def ready_tokens(self, assembler: Assembler, version: int) -> int:
        """Scored tokens that a step at `version` could take."""

    def round(self, assembler: Assembler, version: int, taken: int) -> Round:
        """The samples to `take` now for the open step at `version`, of which `taken` tokens are trained."""

    def overfull(self, assembler: Assembler, version: int, taken: int | None) -> bool:
        """Whether generation under weights `version` must stand still until the next update, lest the next step become
        too large. The open step has `taken` tokens; None: it has closed and is being trained."""


class WholeSteps:
    """A policy of steps in one part: each is planned as a whole before it begins."""

    def choose(self, assembler: Assembler, version: int) -> list[Sample]:
        """The samples to `take` for the step at `version`; empty while it cannot start."""
        raise NotImplementedError

    def wants_drain(self, assembler: Assembler, version: int) -> bool:
        """Whether generation must stop so that a step at `version` can be taken."""
        return False

    def overfull(self, assembler: Assembler, version: int, taken: int | None) -> bool:
        """Never: admission is enough."""
        return False

    def round(self, assembler: Assembler, version: int, taken: int) -> Round:
        """All of the step, once it can start."""
        chosen = self.choose(assembler, version)
        return Round(chosen, bool(chosen), not chosen and self.wants_drain(assembler, version))


class DeadlineCuts(WholeSteps):
    """`train_on: tokens`. `tokens_per_step` is a minimum, exceeded by what the deadlines force."""

    def __init__(self, tokens_per_step: int, max_staleness: int) -> None:
        self.budget = tokens_per_step
        self.max_staleness = max_staleness

    def ready_tokens(self, assembler: Assembler, version: int) -> int:
        """Untrained tokens of finished responses and of those that are due at `version`."""
        due = version - self.max_staleness
        return sum(
            sample.untrained_tokens
            for sample in assembler.samples.values()
            if sample.untrained_tokens and (sample.finish is not None or sample.oldest_version <= due)
        )

    def wants_drain(self, assembler: Assembler, version: int) -> bool:
        """At S = 0 every token is due in the step of its own version, so generation stops once the budget is there."""
        return self.max_staleness == 0 and self.ready_tokens(assembler, version) >= self.budget

    def overfull(self, assembler: Assembler, version: int, taken: int | None) -> bool:
        """While a step is trained: whether the next one could train `close_early_tokens` already."""
        limit = close_early_tokens(self.budget, self.max_staleness)
        return taken is None and self.ready_tokens(assembler, version + 1) >= limit

    def choose(self, assembler: Assembler, version: int) -> list[Sample]:
        """Forced samples, then finished ones from the oldest token on, until the step is as large as it may be."""
        if not assembler.settled(version - self.max_staleness):
            return []
        if self.ready_tokens(assembler, version) < self.budget:
            return []
        due = version - self.max_staleness
        chosen: list[Sample] = []
        finished: list[Sample] = []
        tokens = 0
        for sample in assembler.samples.values():
            if sample.untrained_tokens and sample.oldest_version <= due:
                chosen.append(sample)
                tokens += sample.untrained_tokens
            elif sample.finish is not None:
                finished.append(sample)
        # an empty remainder costs nothing and would otherwise wait for ever
        finished.sort(key=lambda s: (s.oldest_version if s.untrained_tokens else -1, s.order))
        for sample in finished:
            if tokens >= LARGEST_STEP * self.budget and sample.untrained_tokens:
                break
            chosen.append(sample)
            tokens += sample.untrained_tokens
        return chosen


class WholeSamples(WholeSteps):
    """`train_on: samples`. Step k trains samples k * B to (k + 1) * B - 1 once all of them are complete, each with the
    further samples of its episode.

    A multiple of `rollout.group_size` makes every step one of whole groups: samples are numbered group by group.
    With leases admitted only below (version + S + 1) * B (`leases.py`), no token is older than S steps.
    """

    def __init__(self, samples_per_step: int) -> None:
        self.samples_per_step = samples_per_step

    def _batch(self, assembler: Assembler) -> list[int]:
        ids: list[int] = []
        sample_id = -1
        while len(ids) < self.samples_per_step:
            sample_id = assembler.completed.first_absent(sample_id + 1)
            ids.append(sample_id)
        return ids

    def ready_tokens(self, assembler: Assembler, version: int) -> int:
        """Tokens of the next batch once it is complete, 0 before.

        Until then only more generation helps, so admission must not be held back.
        """
        return sum(sample.untrained_tokens for sample in self.choose(assembler, version))

    def choose(self, assembler: Assembler, version: int) -> list[Sample]:
        """The next batch in sample order, if every one of it is complete."""
        found = [assembler.episode_of(sample_id) for sample_id in self._batch(assembler)]
        ended = [episode for episode in found if episode is not None]
        return [sample for episode in ended for sample in episode] if len(ended) == len(found) else []
