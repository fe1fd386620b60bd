"""The lease of a host: how both ends know when the other has given it up. Pure: the clock is a parameter.

    agent      beat n is sent at t ---> launcher: the host is lost `lost_s` after the last beat
    agent      its echo comes back <--- the lease is good until t + `fence_s`, whatever the echo's own time

A beat is heard after it was sent. So an agent whose lease has run out ends everything `lost_s - fence_s` before the
launcher starts it elsewhere, or again, and neither clock is compared with the other.
"""

from __future__ import annotations

from collections import deque

BEATS_PER_FENCE = 6
LONGEST_BEAT_S = 2.0


def beat_seconds(fence_s: float) -> float:
    """Return the seconds between two beats."""
    return min(LONGEST_BEAT_S, fence_s / BEATS_PER_FENCE)


class Lease:
    """An agent's side."""

    def __init__(self, fence_s: float, now: float) -> None:
        self._fence_s = fence_s
        self._good_from = now
        self._sent: deque[tuple[int, float]] = deque()
        self._number = 0

    def beat(self, now: float) -> int:
        """Return the number of a beat that is sent now."""
        self._number += 1
        self._sent.append((self._number, now))
        return self._number

    def echoed(self, number: int) -> None:
        """Note that the launcher has heard this beat."""
        while self._sent and self._sent[0][0] <= number:
            sent, at = self._sent.popleft()
            if sent == number:
                self._good_from = max(self._good_from, at)

    def left_s(self, now: float) -> float:
        """Return for how many seconds the lease is good; not above 0 once it has run out."""
        return self._good_from + self._fence_s - now
