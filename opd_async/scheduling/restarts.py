"""How often, and how soon, a role may be restarted. Pure: the clock is injected, nothing sleeps here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

MAX_BACKOFF_S = 30.0


class RestartBudget:
    """`limit` restarts of each role within any `window_s` seconds: a role that lives on earns its restarts back.

    A restart waits `backoff_s * 2**n` seconds, at most 30, where n restarts of the role lie within the last `window_s`:
    the wait shrinks as they grow old. `clock` gives seconds on any monotonic scale.
    """

    def __init__(self, limit: int, window_s: float, backoff_s: float, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._window_s = window_s
        self._backoff_s = backoff_s
        self._clock = clock
        self._used: dict[str, int] = {}
        self._recent: dict[str, deque[float]] = {}
        """When each role was restarted, within the window."""

    def next_delay(self, role: str) -> float | None:
        """Spend one restart of `role`: seconds to wait before it, or None if those of the window are spent.

        One death is often reported twice (a process ends, its connection drops). A report that comes while the
        restart is still due costs nothing and gets the rest of the wait.
        """
        now = self._clock()
        recent = self._recent.setdefault(role, deque())
        if recent and now < recent[-1]:
            return recent[-1] - now
        while recent and now - recent[0] >= self._window_s:
            recent.popleft()
        if len(recent) >= self._limit:
            return None
        # min of the exponent: 2**used overflows a float for a very large limit
        delay = min(MAX_BACKOFF_S, self._backoff_s * 2.0 ** min(len(recent), 64))
        self._used[role] = self._used.get(role, 0) + 1
        recent.append(now + delay)
        return delay

    @property
    def used(self) -> dict[str, int]:
        """Restarts spent in the whole run, by role; roles that never died are absent."""
        return dict(self._used)
