"""Call the user's `tracking.function` in a thread, with every row of metrics.jsonl and every event.

    Ledger, Progress -> bounded queue -> thread -> function(kind, row)

Nothing here can end a run or hold it up. An exception of the function is said and counted; rows that a slow function
has no time for are left out and counted.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from opd_async.hooks import blame, load_hook

KEY = "tracking.function"
MAX_WAITING = 4096
"""Rows that wait for a function that is slow."""
CLOSE_DEADLINE_S = 10.0
"""How long the end of a run waits for the function to take what is queued."""

log = logging.getLogger(__name__)

Track = Callable[[str, dict[str, Any]], object]


class Tracker:
    """A context manager; `track` may be called from any thread. Without a path of a function it does nothing."""

    def __init__(self, path: str | None, say: Callable[[str], None], max_waiting: int = MAX_WAITING) -> None:
        """Load the function; raises `InputError` if that fails. `say` gets a line about each kind of trouble."""
        self._path = path
        self._function: Track | None = load_hook(KEY, path) if path is not None else None
        self._say = say
        self._rows: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._follow, name="tracking", daemon=True)
        self.failures = 0
        self.left_out = 0

    def __enter__(self) -> Tracker:
        if self._function is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def track(self, kind: str, row: dict[str, Any]) -> None:
        """Hand on a row: `step`, `evaluation` or `event`. Never waits."""
        if self._function is None:
            return
        try:
            self._rows.put_nowait((kind, copy.deepcopy(row)))
        except queue.Full:
            self.left_out += 1
            if self.left_out == 1:
                self._say(f"warning: {KEY}: {self._path} is slower than the run; rows are left out from here on")

    def close(self) -> None:
        """Wait for the queued rows, for 10 s at most, and say how many were lost."""
        if self._function is None or not self._thread.is_alive():
            return
        try:
            self._rows.put(None, timeout=CLOSE_DEADLINE_S)
        except queue.Full:
            pass
        else:
            self._thread.join(CLOSE_DEADLINE_S)
        if self._thread.is_alive():
            self._say(f"warning: {KEY}: {self._path} did not end within {CLOSE_DEADLINE_S:.0f} s; it is left alone")
        if self.failures or self.left_out:
            lost = f"{self.failures} rows on which it raised, {self.left_out} left out"
            self._say(f"warning: {KEY}: {self._path} has not got everything: {lost}")

    def _follow(self) -> None:
        """Run the thread: call the function once for each row."""
        assert self._function is not None and self._path is not None
        while (item := self._rows.get()) is not None:
            kind, row = item
            try:
                self._function(kind, row)
            except BaseException as error:  # the edge of the user's code: it must not end the thread either
                self.failures += 1
                if self.failures == 1:
                    given = f"{kind} {row.get('step', row.get('evaluation', ''))}".strip()
                    then = "look at the row in metrics.jsonl: the run goes on"
                    self._say(f"warning: {blame(KEY, self._path, given, error, then)}")
                log.debug("%s", KEY, exc_info=error)
