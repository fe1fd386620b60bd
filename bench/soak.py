"""Does anything grow while a run goes on: memory, files, threads, containers of every role, over many samples.

    python -m bench.soak [--samples 100000] [--every 2.0] [--json FILE] [--set a.b=c ...]

    the quickstart's models, without evaluations -> the launcher and its roles, looked at from outside -> slopes

Each figure is fitted by a line over the samples that were trained, from a third of the run on: what a process takes
while it warms up says nothing. The error of a slope is that of the means of `BLOCKS` stretches of time, because
neighbours in time resemble each other. A figure grows if its slope is above zero by more than `ERRORS` errors, and the
growth over the whole stretch is more than what `LEAST` allows for: a page, a socket that closes late.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from array import array
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil

from opd_async.data.jsonl import read_jsonl_ends
from opd_async.files import write_atomically
from opd_async.plan.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = 12
ERRORS = 3.0
WARM_UP = 1 / 3
LOOKED_AT = ("memory (MiB)", "open files", "threads")
LEAST = {"memory (MiB)": 1.0, "open files": 2.0, "threads": 2.0, "objects": 200.0}
"""Growth over the whole stretch that counts for none; of containers a tenth of their mean."""
CONTAINERS = (
    "opd_launcher_leases_active",
    "opd_rollout_running_requests",
    "opd_rollout_unacknowledged_chunks",
    "opd_teacher_queue_tokens",
    "opd_intake_backlog_tokens",
    "opd_engine_running_requests",
    "opd_engine_waiting_requests",
    "opd_engine_kv_used_tokens",
)
LAUNCHER = "launcher"
ADDITION = "examples/addition"
Series = dict[tuple[str, str], "array[float]"]
"""By role and figure: (samples trained, value), one after the other. Compact, because `bench.wire.soak` looks at the
process that keeps them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of one role: at the begin and the end of the stretch, and its growth for 1,000 samples."""

    role: str
    figure: str
    begin: float
    end: float
    slope: float
    error: float
    grows: bool


def fitted(role: str, figure: str, points: Sequence[tuple[float, float]] | array[float]) -> Row:
    """Fit a line to (samples, value) behind the warm-up."""
    samples, values = np.asarray(points, np.float64).reshape(-1, 2).T
    late = samples >= samples[0] + WARM_UP * (samples[-1] - samples[0])
    samples, values = samples[late], values[late]
    parts = [part for part in np.array_split(np.arange(len(samples)), BLOCKS) if len(part)]
    x, y = (np.array([row[part].mean() for part in parts]) for row in (samples, values))
    spread = float(((x - x.mean()) ** 2).sum())
    if len(x) < 3 or spread == 0.0:
        raise ValueError(f"{role}, {figure}: {len(x)} stretches of time are too few")
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    residuals = y - y.mean() - slope * (x - x.mean())
    error = float(np.sqrt((residuals**2).sum() / (len(x) - 2) / spread))
    growth, least = slope * (samples[-1] - samples[0]), LEAST.get(figure, 0.1 * float(values.mean()) + 1.0)
    return Row(
        role=role,
        figure=figure,
        begin=float(y[0]),
        end=float(y[-1]),
        slope=1000 * slope,
        error=1000 * error,
        grows=bool(slope > ERRORS * error and growth > least),
    )


def processes(plan: Plan, launcher: psutil.Process) -> dict[str, list[psutil.Process]]:
    """The processes of each role now, with their children."""
    commands = {role.command: role.name for role in plan.roles}
    found = {LAUNCHER: [launcher]}
    for child in launcher.children():
        try:
            if (name := commands.get(tuple(child.cmdline()))) is not None:
                found[name] = [child, *child.children(recursive=True)]
        except psutil.Error:
            continue
    return found


def look(members: Sequence[psutil.Process]) -> dict[str, float]:
    """Memory, open files and threads of a role's processes together."""
    total: dict[str, float] = dict.fromkeys(LOOKED_AT, 0.0)
    for process in members:
        try:
            with process.oneshot():
                figures = (process.memory_info().rss / (1 << 20), process.num_fds(), process.num_threads())
        except psutil.Error:
            continue
        for name, value in zip(LOOKED_AT, figures, strict=True):
            total[name] += value
    return total


def containers(folder: Path) -> Iterator[tuple[str, str, float]]:
    """(role, figure, value) of the gauges that say how full a role's containers are."""
    for target in json.loads((folder / "targets.json").read_bytes()):
        url = f"http://{target['targets'][0]}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                lines = reply.read().decode().splitlines()
        except OSError:  # it does not answer yet, or no more
            continue
        for line in lines:
            name, _, value = line.rpartition(" ")
            if name in CONTAINERS:
                yield target["labels"]["process"], name, float(value)


def new_series() -> Series:
    """Without any figure yet."""
    return defaultdict(lambda: array("d"))


class Samples:
    """Counts the samples that were trained, reading only new rows of metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._end = 0
        self.count = 0.0

    def look(self) -> float:
        """Return how many there are by now."""
        if self._path.exists():
            for end, row in read_jsonl_ends(self._path, self._end):
                self._end = end
                self.count += row.get("completed", 0.0)
        return self.count


def watch(
    launcher: subprocess.Popen[bytes], folder: Path, samples: int, every_s: float, until: float = math.inf
) -> Series:
    """Look at every role until so many samples are trained, or `until`, on `time.monotonic`'s scale. `RuntimeError` if
    the run ends before."""
    series = new_series()
    counter, parent = Samples(folder), psutil.Process(launcher.pid)
    while counter.look() < samples and time.monotonic() < until:
        if launcher.poll() is not None:
            raise RuntimeError(f"the run ended with {launcher.returncode} after {counter.count:,.0f} samples")
        time.sleep(every_s)
        if counter.count == 0:
            continue
        plan = Plan.model_validate_json((folder / "plan.json").read_bytes())
        for role, members in processes(plan, parent).items():
            for figure, value in look(members).items():
                series[role, figure].extend((counter.count, value))
        for role, figure, value in containers(folder):
            series[role, figure].extend((counter.count, value))
    return series


def rows_of(series: Series, roles: Container[str] | None = None) -> list[Row]:
    """The rows of what was looked at often enough; `roles`: of these kinds of roles only."""
    found = []
    for (role, figure), points in sorted(series.items()):
        if len(points) > 2 * BLOCKS and (roles is None or role.rsplit("-", 1)[0] in roles):
            found.append(fitted(role, figure, points))
    return found


def soak(
    root: Path, samples: int, every_s: float, settings: Sequence[str] = (), until: float = math.inf
) -> tuple[list[Row], int]:
    """Run until so many samples are trained, or `until`, then stop it in order; returns how many there were.

    `RuntimeError` names the log if it fails."""
    make = [sys.executable, f"{ADDITION}/make_data.py", "--out", str(root), "--train", "20000", "--held-out", "10"]
    subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    values = (
        *("name=soak", f"run_dir={root}", "schedule.steps=1000000", "checkpoint.every_steps=20"),
        *("checkpoint.export_hf=false", "evaluation.every_steps=null", "evaluation.teacher=false"),
        *(f"data.train.path={root}/train.jsonl", f"data.held_out.path={root}/held_out.jsonl", "evaluation.prompts=10"),
        *settings,
    )
    command = [sys.executable, "-m", "opd_async.launch", "--topology", "examples/quickstart.yaml"]
    log = root / "soak.log"
    with log.open("wb") as file:
        launcher = subprocess.Popen(
            [*command, *(word for value in values for word in ("--set", value))],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        series = watch(launcher, root / "soak", samples, every_s, until)
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {log.read_text(errors='replace')[-2000:]}") from None
    finally:
        launcher.terminate()
        launcher.wait()
    return rows_of(series), int(Samples(root / "soak").look())


def table(rows: Sequence[Row]) -> str:
    """A line for each figure of each role."""
    lines = [f"{'role':<18} {'figure':<34} {'begin':>10} {'end':>10} {'for 1,000 samples':>24}"]
    for row in rows:
        slope = f"{row.slope:+.4f} ± {row.error:.4f}"
        verdict = "  GROWS" if row.grows else ""
        lines.append(f"{row.role:<18} {row.figure:<34} {row.begin:>10.1f} {row.end:>10.1f} {slope:>24}{verdict}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print the table; the exit code is 1 if anything grows."""
    parser = argparse.ArgumentParser(description="Does anything grow while a run goes on?")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end then, with the samples so far")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for the launcher")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="opd-soak-") as folder:
        until = began + 60 * arguments.minutes
        rows, count = soak(Path(folder), arguments.samples, arguments.every, arguments.set, until)
    print(f"{table(rows)}\n{count:,} samples in {time.monotonic() - began:.0f} s")
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    return 1 if any(row.grows for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
