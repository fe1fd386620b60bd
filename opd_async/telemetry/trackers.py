"""Feed the trackers of a run (`tracking.trackers`), each in a process of its own.

    Ledger, SampleRecord, Progress -> Trackers.track -> bounded queue -> thread -> pipe -> tracker_process/
                                                        lost, said once <- thread <- pipe <-

Nothing here can end a run or hold it up: a tracker that raises, hangs or is slow loses rows, which are counted. At the
end each has a while to send what it has, and is then killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opd_async.config.topology import Topology

SCRIPT = Path(__file__).parents[1] / "tracker_process/__main__.py"
FOLDER = "tracking"
"""In a run's folder: what each tracker has had, and the files of those that write files."""
MAX_WAITING = 1024
CLOSE_DEADLINE_S = 60.0
"""How long the end of a run waits for all trackers together to send what they have."""
SHORT_DEADLINE_S = 10.0
"""The same where the run fails."""
LOST = "opd_launcher_tracker_lost_total"


def command_of(topology: Topology) -> list[str]:
    """The beginning of a tracker's command line: its Python does not look for modules beside the script."""
    return [str(topology.tracking.python or sys.executable), "-P", str(SCRIPT)]


class Tracker:
    """One tracker's process; its methods never wait but for `close`, and never fail."""

    def __init__(
        self, kind: str, command: Sequence[str], log: Path, say: Callable[[str], None], count: Callable[[str], None]
    ) -> None:
        """`log` gets what the tracker's package prints, `say` the first trouble, `count` each lost row."""
        self._kind = kind
        self._command = list(command)
        self._log = log
        self._say = say
        self._count = count
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = self._said = False
        self.lost = 0

    def start(self, setup: dict[str, Any]) -> None:
        """Start the process."""
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is the launcher's
                )
        except OSError as error:
            self._lose(f"its process does not start ({error})")
            return
        self._lines.put_nowait(json.dumps(setup))
        self._threads = [
            threading.Thread(target=work, args=(self._process,), name=f"{self._kind}-{name}", daemon=True)
            for name, work in (("write", self._write), ("read", self._read))
        ]
        for thread in self._threads:
            thread.start()

    def put(self, kind: str, line: str) -> None:
        """Hand on one line. Samples, which are large, leave half of the queue to figures."""
        full = kind == "sample" and self._lines.qsize() > MAX_WAITING // 2
        with contextlib.suppress(queue.Full):
            if self._process is not None and not full:
                self._lines.put_nowait(line)
                return
        self._lose("it is slower than the run" if self._process is not None else "its process has not started")

    def end(self) -> None:
        """Let the process end once it has got the queued lines."""
        with contextlib.suppress(queue.Full):  # then it hangs, and `close` kills it
            self._lines.put_nowait(None)

    def close(self, deadline: float) -> None:
        """Wait for the end of the process until `deadline` of the monotonic clock, then kill it."""
        process = self._process
        if process is None or self._closed:
            return
        self._closed = True
        late = not _ended(process, deadline - time.monotonic())
        if late:
            self._lose("it had not sent everything by the end", rows=0)
        # what the process has started, such as a sender of its own, goes with it; before `wait`, after which its number
        # may be another's
        _kill_group(process.pid)
        code = process.wait()
        with contextlib.suppress(queue.Full):  # the writer finds the pipe broken and empties the queue
            self._lines.put(None, timeout=1.0)
        for thread in self._threads:
            thread.join(1.0)
        if code and not late:
            self._lose(f"its process has ended with code {code}", rows=0)
        if self.lost:
            self._say(f"warning: tracker {self._kind} has not got {self.lost} rows; metrics.jsonl has all of them")

    def kill(self) -> None:
        """Kill the process; a `close` in another thread, which waits for it, returns."""
        if self._process is not None and self._process.returncode is None:
            _kill_group(self._process.pid)

    def _lose(self, why: str, rows: int = 1) -> None:
        with self._lock:
            said, self._said = self._said, True
            self.lost += rows
        for _ in range(rows):
            self._count(self._kind)
        if not said:
            self._say(f"warning: tracker {self._kind}: {why}; the run goes on, see {self._log}")

    def _write(self, process: subprocess.Popen[bytes]) -> None:
        """Run a thread: lines into the pipe."""
        assert process.stdin is not None
        broken = False
        while (line := self._lines.get()) is not None:
            try:
                if not broken:
                    process.stdin.write(line.encode() + b"\n")
                    process.stdin.flush()
            except OSError:
                broken = True
            if broken:
                self._lose("its process has ended")
        with contextlib.suppress(OSError):
            process.stdin.close()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """Run a thread: what the process says of lost rows."""
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError, AttributeError):
                    for kind, text in json.loads(line).items():
                        self._lose(str(text), rows=1 if kind == "lost" else 0)


class Trackers:
    """A context manager around all trackers of a run. Its methods may be called from any thread and never wait."""

    def __init__(
        self, topology: Topology, folder: Path, say: Callable[[str], None], count: Callable[[str], None]
    ) -> None:
        """`folder` is the run's; `say` gets a line about a tracker in trouble, `count` its name for each lost row."""
        self._topology = topology
        self._folder = folder
        self._say = say
        logs = folder / "logs"
        command = command_of(topology)
        self._all = {
            kind: Tracker(kind, command, logs / f"tracker-{kind}.log", say, count)
            for kind in topology.tracking.trackers
        }

    def __enter__(self) -> Trackers:
        for kind, tracker in self._all.items():
            tracker.start(self._setup(kind))
        return self

    def __exit__(self, *_: object) -> None:
        self.close(SHORT_DEADLINE_S)

    def close(self, within_s: float = CLOSE_DEADLINE_S) -> None:
        """End every tracker, and say what each has lost. A second call does nothing."""
        deadline = time.monotonic() + within_s
        for tracker in self._all.values():
            tracker.end()  # all at once: each takes its time to send
        for tracker in self._all.values():
            tracker.close(deadline)

    def kill(self) -> None:
        """End every tracker at once: a `close` under way returns."""
        for tracker in self._all.values():
            tracker.kill()

    def _setup(self, kind: str) -> dict[str, Any]:
        """The first line of a tracker. It has the topology without what is secret."""
        section, own = self._topology.tracking, self._folder / FOLDER
        own.mkdir(parents=True, exist_ok=True)
        return {
            "kind": kind,
            "project": section.project,
            "name": section.run_name or self._topology.name,
            "group": section.group,
            "folder": str((section.folder or own) / kind),
            "offline": section.offline,
            "state": str(own / f"{kind}.json"),
            "config": public(self._topology.model_dump(mode="json")),
        }

    def track(self, kind: str, row: Any) -> None:
        """Hand on a `step`, an `evaluation`, a `sample`, the `report`, or the step of a `rewind`."""
        if self._all and kind in ("step", "evaluation", "sample", "report", "rewind"):
            line = json.dumps({kind: row})
            for tracker in self._all.values():
                tracker.put(kind, line)


def _ended(process: subprocess.Popen[bytes], within_s: float) -> bool:
    """Wait for the end of a process, which stays to be waited for."""
    end = os.pidfd_open(process.pid)
    try:
        return bool(select.select([end], [], [], max(within_s, 0.0))[0])
    finally:
        os.close(end)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


SECRET = ("api_key", "admin_api_key", "key", "token")
"""Names of keys whose values are nobody's but the run's."""


def public(values: dict[str, Any]) -> dict[str, Any]:
    """Copy a topology without the values of keys that are secrets."""
    return {
        key: public(value) if isinstance(value, dict) else "..." if key in SECRET and value is not None else value
        for key, value in values.items()
    }
