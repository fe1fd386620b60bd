"""How often, and how soon, a role may be restarted. Pure: the clock is injected, nothing sleeps here."""

from __future__ import annotations

from collections.abc import Callable

MAX_BACKOFF_S = 30.0


class RestartBudget:
    """`limit` restarts for each role in a whole run; a role that lives long afterwards earns none back.

    The n-th restart of a role (n = 1, 2, ...) waits `backoff_s * 2**(n - 1)` seconds, at most 30. `clock` gives
    seconds on any monotonic scale.
    """

    def __init__(self, limit: int, backoff_s: float, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._backoff_s = backoff_s
        self._clock = clock
        self._used: dict[str, int] = {}
        self._due: dict[str, float] = {}

    def next_delay(self, role: str) -> float | None:
        """Spend one restart of `role`: seconds to wait before it, or None if the budget is spent.

        One death is often reported twice (a process ends, its connection drops). A report that comes while the
        restart is still due costs nothing and gets the rest of the wait.
        """
        now = self._clock()
        if now < self._due.get(role, now):
            return self._due[role] - now
        used = self._used.get(role, 0)
        if used >= self._limit:
            return None
        # min of the exponent: 2**used overflows a float for a very large limit
        delay = min(MAX_BACKOFF_S, self._backoff_s * 2.0 ** min(used, 64))
        self._used[role] = used + 1
        self._due[role] = now + delay
        return delay

    @property
    def used(self) -> dict[str, int]:
        """Restarts spent, by role; roles that never died are absent."""
        return dict(self._used)
