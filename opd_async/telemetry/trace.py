"""What a process does when: events in memory, then in a file of its own in the folder `trace` of the run.

    span, event -> a block of events -> trace/NAME.jsonl -> trace.json.gz (`trace_file.py`)

A file that is full or cannot be written takes no more events. They are counted, and nothing else happens.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_async.clock import WALL
from opd_async.data.jsonl import JsonlRecord
from opd_async.plan.plan import Plan

TRACE_FOLDER = "trace"
BLOCK = 128
"""Events are written so many at once,"""
BLOCK_S = 1.0
"""or with the first event that comes so many seconds after the last block."""
TRAINED = "trained"
"""The lane of the moments at which parts of samples went to the learner."""

Value = int | float | str
log = logging.getLogger(__name__)


class Trace:
    """The events of one process; a context manager that writes the last of them. Off: everything is forgotten.

    Times are those of the system's clock, so that the processes of a host agree. Not for several threads.
    """

    def __init__(
        self, path: Path | None, process: str = "", limit: int = 0, clock: Callable[[], float] = WALL.now
    ) -> None:
        """Go on behind the events that the file at `path` has; None: off. `limit` is its size in bytes."""
        self._path = path
        self._process = process
        self._limit = limit
        self._clock = clock
        self._events: list[list[object]] = []
        self._written_at = clock()
        self._record: JsonlRecord | None = None
        self.lost = 0
        """Events that have no place in the file."""
        if path is not None:
            self._record = JsonlRecord(path, log.warning)

    @classmethod
    def of(cls, plan: Plan, process: str) -> Trace:
        """The trace of a process of the run, where `telemetry.trace` asks for one."""
        telemetry = plan.topology.telemetry
        path = plan.run_folder / TRACE_FOLDER / f"{process}.jsonl" if telemetry.trace else None
        return cls(path, process, telemetry.trace_mib << 20)

    @property
    def on(self) -> bool:
        """Whether events are kept: what is dear to say may be left unsaid otherwise."""
        return self._record is not None

    def span(self, lane: str, name: str, seconds: float, **values: Value) -> None:
        """Something that ends now and took `seconds`. `lane` is the line of the timeline that it belongs to.

        The values `sample` (a sample id) and `step` are also what samples and steps are found by.
        """
        if self._record is not None:
            self._add(lane, name, self._clock() - seconds, seconds, values)

    def event(self, lane: str, name: str, **values: Value) -> None:
        """Something that happens now."""
        if self._record is not None:
            self._add(lane, name, self._clock(), None, values)

    @contextmanager
    def during(self, lane: str, name: str, **values: Value) -> Iterator[None]:
        """A span around a block, however it ends."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.span(lane, name, time.perf_counter() - began, **values)

    def _add(self, lane: str, name: str, at: float, seconds: float | None, values: dict[str, Value]) -> None:
        self._events.append([lane, name, round(at, 6), None if seconds is None else round(seconds, 6), values])
        if len(self._events) >= BLOCK or self._clock() - self._written_at >= BLOCK_S:
            self._write()

    def _write(self) -> None:
        events, self._events = self._events, []
        self._written_at = self._clock()
        record = self._record
        if record is None or not events:
            return
        if record.size >= self._limit:
            if not self.lost:
                log.warning("%s is full: no more events go there; raise telemetry.trace_mib", self._path)
            self.lost += len(events)
        elif not record.write({"process": self._process, "pid": os.getpid(), "events": events}):
            self.lost += len(events)

    def close(self) -> None:
        """Write what is left; later events are forgotten. It is safe to call this twice."""
        self._write()
        if self._record is not None:
            if self.lost:
                log.warning("%d events have no place in %s", self.lost, self._path)
            self._record.close()
            self._record = None

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


OFF = Trace(None)
"""The trace of a process that has none."""
