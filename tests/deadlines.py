"""Deadlines of tests: they are there so that a hang ends with a name, and never because a machine is slow."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

GENEROUS = 6.0
"""How much longer than on an idle machine anything may take on one that is about to get busy."""


def patience(seconds: float) -> float:
    """Deadline in seconds for what takes at most `seconds` on an idle machine: the longer, the busier this one is."""
    return seconds * GENEROUS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


async def once(true: Callable[[], bool]) -> None:
    """Return when it is true, which is soon, and waits for nothing but the event loop."""
    async with asyncio.timeout(patience(5.0)):
        while not true():  # noqa: ASYNC110 - any state of any object
            await asyncio.sleep(0)
