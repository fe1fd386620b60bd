"""Give back to the system the memory that a process has freed.

glibc keeps what is freed, for whoever asks for as much again. Where sizes vary, as those of a step's tensors do, more
and more of it lies between what is in use, and a process grows for hours without anything in it that grows. Asked to,
glibc gives whole pages of it back: 5 ms for 75 MiB, and as long again for the next use of them.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable

EVERY_S = 60.0


def give_back() -> None:
    """Give freed pages back; without glibc, do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class GivesBack:
    """Gives freed memory back when it is called, but not twice within `EVERY_S` seconds."""

    def __init__(self, give: Callable[[], None] = give_back, clock: Callable[[], float] = time.monotonic) -> None:
        self._give = give
        self._clock = clock
        self._last = clock()

    def __call__(self) -> None:
        """Give back what was freed, unless it was done a moment ago."""
        now = self._clock()
        if now - self._last >= EVERY_S:
            self._last = now
            self._give()


def give_back_regularly(loop: asyncio.AbstractEventLoop, give: Callable[[], None] = give_back) -> None:
    """Have `loop` give freed memory back every `EVERY_S` seconds for as long as it runs."""

    def again() -> None:
        give()
        loop.call_later(EVERY_S, again)

    loop.call_later(EVERY_S, again)
