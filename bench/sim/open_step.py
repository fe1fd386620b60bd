"""The step that the simulated learner is at: what it has taken, and when it waited."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class OpenStep:
    """One optimizer step between two updates; `began` and `busy_s` in seconds of the virtual clock."""

    began: float = 0.0
    taken: int = 0
    forwarded: int = 0
    busy_s: float = 0.0
    parts: int = 0
    busy: bool = False
    """A part is being trained."""

    def add(self, trained: int, forwarded: int, seconds: float) -> None:
        """A part goes to the learner."""
        self.taken += trained
        self.forwarded += forwarded
        self.busy_s += seconds
        self.parts += 1
        self.busy = True

    def waited(self, now: float) -> float:
        """Share of the time since it was opened in which the learner had nothing to do."""
        return 1 - self.busy_s / max(now - self.began, 1e-9)
