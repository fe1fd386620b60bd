"""Time and chance as a role meets them, in one object that a test can exchange."""

from __future__ import annotations

import asyncio
import random
import time


class Clock:
    """The real ones. Seconds; `now` counts from no particular moment and never goes back."""

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait. On cancel: nothing is left behind."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        """A block that raises `TimeoutError` when it takes longer; None: it may take for ever."""
        return asyncio.timeout(seconds)

    def random(self) -> float:
        """Uniform in [0, 1)."""
        return random.random()
