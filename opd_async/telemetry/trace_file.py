"""Make one timeline of the traces of a run's processes, in the Chrome trace format, for ui.perfetto.dev.

    trace/*.jsonl, metrics.jsonl -> lanes without overlaps -> trace.json.gz

Every process has its lanes; what overlaps in one lane goes to further ones of the same name. Some samples are shown
once more, each in lanes of its own: from its first token to the step that trained it, through all processes.
Format: "Trace Event Format", Google, the JSON object form; events X (complete), i (instant), C (counter), M (names).
"""

from __future__ import annotations

import gzip
import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_async.data.jsonl import read_jsonl
from opd_async.errors import InputError
from opd_async.telemetry.trace import TRACE_FOLDER, TRAINED

TRACE_FILE = "trace.json.gz"
MOST_SAMPLES = 200
"""So many samples are shown in lanes of their own."""
ORDER = ("launcher", "rollout", "teacher", "intake", "learner")
"""Processes from the top of the page to its end, and those of other names behind them."""
FIGURES = {"reverse KL": "reverse_kl", "tokens of the step": "tokens", "gradient norm": "grad_norm"}
"""Curves above the processes, by the columns of `metrics.jsonl`."""
MICRO = 1e6
"""Of a second: the format's unit of time."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at `at` (seconds since 1970) and took `seconds`; None for a moment."""

    lane: str
    name: str
    at: float
    seconds: float | None
    values: dict[str, Any]

    @property
    def end(self) -> float:
        """When it was over."""
        return self.at + (self.seconds or 0.0)


@dataclass(slots=True)
class Process:
    """The events of a process, or of a sample."""

    name: str
    events: list[Event] = field(default_factory=list)


def write_trace(folder: Path, out: Path, most: int = MOST_SAMPLES) -> int:
    """Write the timeline of the run in `folder` to `out`, whole or not at all, with `most` samples; returns the events.

    Raises `InputError` for a run without a trace, `OSError` where `out` cannot be written.
    """
    processes = read_processes(folder)
    if not processes:
        raise InputError(f"{folder}: has no trace; a run writes one with telemetry.trace: true")
    rows = timeline(processes, figures(folder / "metrics.jsonl"), most)
    fresh, count = out.with_name(f"{out.name}.new"), 0
    try:
        with gzip.open(fresh, "wt", encoding="utf-8", compresslevel=5) as file:
            file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
            for count, row in enumerate(rows, start=1):
                file.write((",\n" if count > 1 else "") + json.dumps(row, separators=(",", ":")))
            file.write("\n]}\n")
        fresh.replace(out)
    except BaseException:
        fresh.unlink(missing_ok=True)  # half of it is of no use, and takes the room that there is none of
        raise
    return count


def read_processes(folder: Path) -> list[Process]:
    """What each process of a run has written, in the order of the page; half a row at an end is left out."""
    found = [_read(path) for path in (folder / TRACE_FOLDER).glob("*.jsonl")]
    return sorted((one for one in found if one.events), key=_rank)


def _read(path: Path) -> Process:
    process = Process(path.stem)
    for row in read_jsonl(path):
        process.events += (Event(*event) for event in row["events"])
    return process


def _rank(process: Process) -> tuple[int, str]:
    kind = process.name.split("-")[0]
    return (ORDER.index(kind) if kind in ORDER else len(ORDER)), process.name


def figures(path: Path) -> list[tuple[float, str, float]]:
    """(seconds since 1970, what, how much) of every step, where there are figures."""
    if not path.is_file():
        return []
    return [
        (float(row["time"]), title, float(row[column]))
        for row in read_jsonl(path)
        if "evaluation" not in row
        for title, column in FIGURES.items()
        if row.get(column) is not None
    ]


def timeline(
    processes: Sequence[Process], curves: Sequence[tuple[float, str, float]] = (), most: int = MOST_SAMPLES
) -> Iterator[dict[str, Any]]:
    """The events of the format, times in microseconds since the first of them."""
    start = min((event.at for process in processes for event in process.events), default=0.0)
    for at, title, value in curves:
        if at >= start:
            yield {"ph": "C", "pid": 0, "name": title, "ts": _micro(at - start), "args": {title: value}}
    yield from _named("process", 0, 0, "figures")
    for pid, process in enumerate(processes, start=1):
        yield from _named("process", pid, 0, process.name)
        yield from _lanes(process.events, pid, start)
    pid = len(processes) + 1
    yield from _named("process", pid, 0, "samples")
    tid = 0
    for sample in samples_of(processes, most):
        rows = list(_lanes(sample.events, pid, start, sample.name, tid))
        tid = max((row["tid"] for row in rows), default=tid) + 1
        yield from rows


def samples_of(processes: Iterable[Process], most: int) -> list[Process]:
    """Samples that were generated and trained, evenly spread over the run: at most so many, in their order."""
    found: dict[int, list[Event]] = defaultdict(list)
    for process in processes:
        for event in process.events:
            if (sample := event.values.get("sample")) is not None:
                found[int(sample)].append(event)
    trained = sorted(sample for sample, events in found.items() if any(one.lane == TRAINED for one in events))
    every = max(-(-len(trained) // most), 1)
    return [Process(f"sample {sample}", sorted(found[sample], key=_by_time)) for sample in trained[::every]]


def _lanes(
    events: Sequence[Event], pid: int, start: float, name: str | None = None, first: int = 0
) -> Iterator[dict[str, Any]]:
    """Events of a process in lanes from number `first` on; with `name`, all in lanes of that one name."""
    by_name: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_name[name or event.lane].append(event)
    tid = first
    for lane, members in by_name.items():
        rows = without_overlaps(sorted(members, key=_by_time))
        for number, row in enumerate(rows):
            yield from _named("thread", pid, tid, lane if len(rows) == 1 else f"{lane} ({number + 1})")
            yield from (_event(event, pid, tid, start) for event in row)
            tid += 1


def _by_time(event: Event) -> tuple[float, float]:
    return event.at, -event.end


def without_overlaps(events: Iterable[Event]) -> list[list[Event]]:
    """Events in the order of their begin, dealt to as few rows as have no overlaps, to the first ones most."""
    rows: list[list[Event]] = []
    taken: list[tuple[float, int]] = []
    free: list[int] = []
    for event in events:
        while taken and taken[0][0] <= event.at:
            heapq.heappush(free, heapq.heappop(taken)[1])
        if not free:
            free.append(len(rows))
            rows.append([])
        row = heapq.heappop(free)
        rows[row].append(event)
        heapq.heappush(taken, (event.end, row))
    return rows


def _event(event: Event, pid: int, tid: int, start: float) -> dict[str, Any]:
    row: dict[str, Any] = {"ph": "i", "pid": pid, "tid": tid, "name": event.name, "ts": _micro(event.at - start)}
    row["cat"] = event.lane
    if event.seconds is None:
        row["s"] = "t"  # a mark in its lane alone
    else:
        row |= {"ph": "X", "dur": _micro(event.end - start) - row["ts"]}
    return row | ({"args": event.values} if event.values else {})


def _named(what: str, pid: int, tid: int, name: str) -> Iterator[dict[str, Any]]:
    place: Mapping[str, Any] = {"ph": "M", "pid": pid, "tid": tid}
    yield {**place, "name": f"{what}_name", "args": {"name": name}}
    yield {**place, "name": f"{what}_sort_index", "args": {"sort_index": pid if what == "process" else tid}}


def _micro(seconds: float) -> int:
    return max(round(MICRO * seconds), 0)
