"""Time and chance as a role meets them, in one object that a test can exchange."""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import suppress
from pathlib import Path

OFFSET_FILE_ENV = "OPD_CLOCK_OFFSET_FILE"
"""Set by agents: a file with the seconds to be added to this host's clock to have the launcher's."""


class WallClock:
    """The launcher's time of day, as well as this host knows it. What crosses hosts is stamped with it."""

    def __init__(self, offset_file: Path | None) -> None:
        """`offset_file` None: on the launcher's own host."""
        self._file = offset_file
        self._offset_s = 0.0
        self.refresh()

    def refresh(self) -> None:
        """Take over what the agent knows by now; without a file that can be read, what was known stays."""
        if self._file is not None:
            with suppress(OSError, ValueError):
                self._offset_s = float(self._file.read_text())

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time() + self._offset_s


def _of_environment() -> WallClock:
    name = os.environ.get(OFFSET_FILE_ENV)
    return WallClock(None if name is None else Path(name))


WALL = _of_environment()
"""This process's. A role refreshes it with each heartbeat."""


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
