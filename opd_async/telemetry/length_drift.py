"""Notice that responses shrink: what a teacher that was shown the solution does to a student first. Pure.

mean length of each step's responses -> mean of the first steps against that of the latest -> one warning
"""

from __future__ import annotations

from collections import deque

WINDOW = 10
"""Steps in either mean."""
SHRUNK = 0.7
"""Said once the latest mean is below this share of the first."""


class LengthDrift:
    """Compares the responses of the latest steps with those of the first steps that it was shown."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._latest: deque[float] = deque(maxlen=WINDOW)
        self._said = False

    def step(self, mean: float | None) -> str | None:
        """Take in the mean length of the responses that ended in a step, tokens (None: none did).

        Returns a warning when it is due, once.
        """
        if mean is None or self._said:
            return None
        if len(self._first) < WINDOW:
            self._first.append(mean)
            return None
        self._latest.append(mean)
        before, now = sum(self._first) / WINDOW, sum(self._latest) / len(self._latest)
        if len(self._latest) < WINDOW or now >= SHRUNK * before:
            return None
        self._said = True
        return (
            f"warning: responses have shrunk from {before:,.0f} to {now:,.0f} tokens (means of {WINDOW} steps): the "
            "teacher, who is shown more than the student, may be teaching its style and not what it knows; compare "
            "evaluations, and see docs/learning.md"
        )
