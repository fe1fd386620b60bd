"""The step that the intake is filling: what its parts have taken, and for how long the learner had nothing to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from opd_async.actors.intake.steps import Taken
from opd_async.estimators.advantages import Outcome
from opd_async.scheduling.segments import Segment


@dataclass(slots=True, kw_only=True)
class OpenStep:
    """The step from one weight version. Pure: seconds come from the caller."""

    parts: int = 0
    tokens: int = 0
    taken: list[Taken] = field(default_factory=list)
    kept: list[Taken] = field(default_factory=list)
    """Those of `taken` that a filter lets train."""
    outcomes: list[Outcome] = field(default_factory=list)
    waited_s: float = 0.0
    """Seconds for which the learner had no part to train."""
    opened: float = 0.0
    """When it could take its first token."""
    idle_since: float | None = None
    """When the learner ran out of work; None while it has some."""

    def add(self, taken: Sequence[Taken], kept: Sequence[Taken], outcomes: Sequence[Outcome], now: float) -> None:
        """Note a part that goes to the learner at `now` (seconds)."""
        self.taken += taken
        self.kept += kept
        self.outcomes += outcomes
        self.tokens += sum(segment.tokens for segment in segments_of(kept))
        self.parts += 1
        if self.idle_since is not None:
            self.waited_s += now - self.idle_since
            self.idle_since = None


def segments_of(taken: Sequence[Taken]) -> list[Segment]:
    """What the learner trains of these samples; an empty response has nothing."""
    return [one.segment for one in taken if one.segment is not None]
