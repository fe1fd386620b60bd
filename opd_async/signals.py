"""Signals that ask a run to stop: Ctrl-C, SIGTERM, and a terminal that is gone.

answered            before anything is started, and after everything has ended: the process ends with one line
unwinding           where something has to be taken back: the first signal raises
Signals.install     while a run goes on: the first signal asks for an orderly end, the second for an immediate one
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

EXIT_INTERRUPTED = 128 + signal.SIGINT
NOTHING_STARTED = "stopped by a signal; nothing was started\n"


def stop_signals() -> tuple[signal.Signals, ...]:
    """SIGINT, SIGTERM and SIGHUP; the last one not under `nohup`, which says that a lost terminal does not matter."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)


@contextlib.contextmanager
def answered(words: str = NOTHING_STARTED) -> Iterator[None]:
    """End the process with code 130 and `words` on the first signal. Main thread only; no process may be running yet.

    Nothing is unwound: an exception could arise inside any import or callback, where it might be swallowed, and what
    the process holds so far (a lock, ports) ends with it.
    """

    def end(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(2, words.encode())
        os._exit(EXIT_INTERRUPTED)

    before = {number: signal.signal(number, end) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on each of these signals, as Python itself does for Ctrl-C. Main thread only."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(slots=True)
class Signals:
    """What has arrived; `on_first` is called at once with the first."""

    first: asyncio.Event = field(default_factory=asyncio.Event)
    second: asyncio.Event = field(default_factory=asyncio.Event)
    on_first: Callable[[], None] = lambda: None

    def install(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take over the signals. Main thread only."""
        for number in stop_signals():
            loop.add_signal_handler(number, self.arrived, number)

    def arrived(self, number: int = signal.SIGINT) -> None:
        """One more signal. A lost terminal may tell the same process twice: it never counts as the second."""
        if not self.first.is_set():
            self.first.set()
            self.on_first()
        elif number != signal.SIGHUP:
            self.second.set()
