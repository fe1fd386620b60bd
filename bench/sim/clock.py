"""A virtual clock: what is due next happens next, in the order in which it was asked for."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], None]


class Clock:
    """Seconds since the start. Actions cannot be taken back; whoever asks for one checks that it is still wanted."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._due: list[tuple[float, int, Action]] = []

    def at(self, when: float, action: Action) -> None:
        """Do `action` at `when`, or now if that is past."""
        heapq.heappush(self._due, (max(when, self.now), next(self._order), action))

    def after(self, seconds: float, action: Action) -> None:
        """Do `action` in `seconds`."""
        self.at(self.now + seconds, action)

    def run(self, done: Callable[[], bool]) -> None:
        """Go on until `done`. Raises `RuntimeError` when nothing is due any more: the schedule has deadlocked."""
        while not done():
            if not self._due:
                raise RuntimeError(f"nothing is due after {self.now:.1f} s: the schedule has deadlocked")
            self.now, _, action = heapq.heappop(self._due)
            action()
