"""When to ask a failing engine again: a circuit breaker, backoff, and when to give up. Pure: clock and chance come in.

closed --(`failures` in a row, or trip)--> open --(cool-down)--> half-open: one probe --> closed
                                            ^                         |
                                            +---- it fails: twice the cool-down, up to a limit
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from opd_async.errors import EngineFault

FAILURES = 5
COOL_DOWN_S = 1.0
MAX_COOL_DOWN_S = 15.0
BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
REFUSALS = 3
"""Give up on a request that the engine refuses (HTTP 4xx) after this many tries."""
PASSING = frozenset(
    {EngineFault.BUSY, EngineFault.ABORTED, EngineFault.DISCONNECTED, EngineFault.SILENT, EngineFault.FOREIGN}
)
"""Temporary faults: they say nothing about the request, and waiting may cure them."""

Random = Callable[[], float]
"""Uniform in [0, 1): `random.random`."""


class BreakerState(StrEnum):
    """Whether requests may be sent."""

    CLOSED = "closed"
    """Yes."""
    OPEN = "open"
    """No: the engine is left alone until the cool-down is over."""
    HALF_OPEN = "half_open"
    """A probe is under way; its result decides."""


class Breaker:
    """One engine's. Times are seconds of any monotonic clock."""

    def __init__(
        self,
        random: Random,
        failures: int = FAILURES,
        cool_down_s: float = COOL_DOWN_S,
        max_cool_down_s: float = MAX_COOL_DOWN_S,
    ) -> None:
        """Opens after `failures` in a row, for `cool_down_s` times 0.5 to 1.5 at first."""
        self._random = random
        self._limit = failures
        self._first_cool_down_s = cool_down_s
        self._max_cool_down_s = max_cool_down_s
        self.reset()

    def reset(self) -> None:
        """Close, and forget earlier failures."""
        self.state = BreakerState.CLOSED
        self._failures = 0
        self._failing_since: float | None = None
        self._cool_down_s = self._first_cool_down_s
        self.probe_at = 0.0
        """Unless closed: when the next probe may be sent."""

    def allow(self, now: float) -> bool:
        """Whether a request may be sent now. Unless closed, it is the probe: the caller must report how it ends.

        A probe whose end is never reported is replaced after another cool-down.
        """
        if self.state is BreakerState.CLOSED:
            return True
        if now < self.probe_at:
            return False
        self.state = BreakerState.HALF_OPEN
        self._rest(now)
        return True

    def succeeded(self) -> None:
        """Record a success, whenever its request was sent: the breaker closes, for the engine works."""
        self.reset()

    def failed(self, now: float) -> None:
        """Record a failure. While the breaker is open it belongs to a request sent earlier, and changes nothing."""
        if self._failing_since is None:
            self._failing_since = now
        self._failures += 1
        if self.state is BreakerState.HALF_OPEN:
            self._cool_down_s = min(2 * self._cool_down_s, self._max_cool_down_s)
            self._open(now)
        elif self.state is BreakerState.CLOSED and self._failures >= self._limit:
            self._open(now)

    def trip(self, now: float) -> None:
        """Open at once: the engine answers, but its answers cannot be used."""
        self._failures = max(self._failures, self._limit - 1)
        self.failed(now)

    def failing_for(self, now: float) -> float:
        """Seconds since the first of the failures without a success between them; 0 if there is none."""
        return 0.0 if self._failing_since is None else now - self._failing_since

    def _open(self, now: float) -> None:
        self.state = BreakerState.OPEN
        self._rest(now)

    def _rest(self, now: float) -> None:
        self.probe_at = now + self._cool_down_s * (0.5 + self._random())


def backoff_s(failures: int, random: Random) -> float:
    """Seconds to wait after the n-th failure in a row: doubling up to a limit, times 0.5 to 1."""
    doubled = BACKOFF_S * 2.0 ** min(failures - 1, 16)
    return min(doubled, MAX_BACKOFF_S) * (0.5 + 0.5 * random())


class Failures:
    """What went wrong with one request since it last made progress."""

    def __init__(self) -> None:
        self.counted = 0
        """Failures that were not `PASSING`."""
        self._refusals = 0

    def count(self, fault: EngineFault) -> None:
        """It failed once more."""
        self.counted += fault not in PASSING
        self._refusals += fault is EngineFault.REFUSED

    def hopeless(self, limit: int) -> bool:
        """Whether to give up: it was refused `REFUSALS` times, or failed more than `limit` times in all."""
        return self.counted > limit or self._refusals > min(limit, REFUSALS - 1)
