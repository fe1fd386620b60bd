"""How far a host's clock is from the launcher's, from beats and their echoes. Pure: the clocks are parameters.

    agent      beat n, sent at a ---> launcher: the echo says what its clock was, l
    agent      echo n, here at b <--- offset l - (a + b) / 2, wrong by (b - a) / 2 at most

Of the last echoes the one that was back soonest counts (as in NTP, RFC 5905, section 10: the clock filter), so that a
busy host or line does not show. Clocks drift by a few seconds a day: old echoes are forgotten.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

KEPT = 32
"""Echoes that are compared: a minute of beats."""
WAITING = 64
"""Beats without an echo that are remembered."""


class Reading(NamedTuple):
    """One echo."""

    error_s: float
    """How wrong it may be."""
    offset_s: float
    """What is to be added to this host's clock to have the launcher's."""


class ClockOffset:
    """An agent's side. Seconds; `wall` is this host's clock."""

    def __init__(self) -> None:
        self._sent: deque[tuple[int, float]] = deque(maxlen=WAITING)
        self._readings: deque[Reading] = deque(maxlen=KEPT)

    def beat(self, number: int, wall: float) -> None:
        """A beat is sent now."""
        self._sent.append((number, wall))

    def echoed(self, number: int, launcher: float, wall: float) -> None:
        """Its echo is here now; `launcher` is what the launcher's clock was when it sent it."""
        sent = next((at for beat, at in self._sent if beat == number), None)
        if sent is not None and wall >= sent:  # else this host's clock was set back meanwhile
            self._readings.append(Reading((wall - sent) / 2, launcher - (sent + wall) / 2))

    @property
    def best(self) -> Reading | None:
        """The most exact of the last readings; None before the first."""
        return min(self._readings, default=None)
