"""Where the processor seconds of a thousand trained tokens go: by process, and by what its Python was doing.

    python -m bench.profile --py-spy PATH [--topology examples/quickstart.yaml] [--set A.B=C]
                            [--from-step 10] [--steps 40] [--rate 50] [--within PART] [--json FILE]

    a run, as its users start it -> py-spy on every process, from step to step -> stacks -> kinds of work -> table

py-spy (https://github.com/benfred/py-spy, `pip install py-spy`, anywhere) looks at the stacks of a process from
outside, a few times a second; it is no dependency of this project. A sample counts for the innermost frame whose file
says what it is about; processor seconds are the kernel's, dealt out by those samples. What the kernel did for the
process, and its C threads, are in them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from opd_async.data.jsonl import read_jsonl
from opd_async.files import write_atomically

START_S, STEP_S = 120.0, 60.0
"""Deadlines: of the first step, and of each further one."""

KINDS = ("model", "weights", "HTTP and JSON", "messages", "files", "own code", "waiting")
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("waiting", ("selectors.py", "threading.py", "concurrent/futures", "queue.py")),
    ("weights", ("learner/weights", "engine/weights", "engine/loading")),
    (
        "HTTP and JSON",
        ("aiohttp", "orjson", "json/", "engine/routes", "engine/response", "engine/parse", "actors/client"),
    ),
    ("messages", ("zmq", "msgpack", "opd_async/transport", "actors/rollout/delivery", "actors/rollout/downstream")),
    ("files", ("opd_async/telemetry", "opd_async/files", "prometheus_client", "logging/", "checkpoints")),
    (
        "model",
        (
            "torch/",
            "megatron",
            "learner/model",
            "learner/losses",
            "engine/model",
            "engine/kv",
            "engine/sampl",
            "engine/batch",
            "transformers/",
        ),
    ),
    ("own code", ("opd_async/", "actors/", "learner/")),
)
"""A kind of work and the parts of file names that tell it, in the order in which a frame is compared."""


@dataclass(frozen=True, slots=True)
class Share:
    """One process: processor seconds for a thousand trained tokens, and of what kind they were (shares of 1)."""

    role: str
    cpu_s: float
    kinds: dict[str, float]
    within: float
    """Of the stacks, the share with a frame whose file has `--within` in its name (of 1)."""


def kind_of(stack: Sequence[str]) -> str:
    """What a stack was about; `stack` has the outermost frame first, as py-spy names it: `name (file:line)`."""
    for frame in reversed(stack):
        for kind, parts in RULES:
            if any(part in frame for part in parts):
                return kind
    return "own code"


def read_samples(text: str) -> Counter[str]:
    """Samples by stack, of py-spy's raw format: a line for each stack, frames between semicolons, then how often."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        stack, _, count = line.rpartition(" ")
        if count.isdigit():  # py-spy does not stop the process: now and then a name is torn
            found[stack] += int(count)
    return found


def share_of(role: str, cpu_s: float, stacks: Counter[str], within: str | None) -> Share:
    """What a process spent `cpu_s` on, by its sampled `stacks`."""
    total = stacks.total() or 1
    kinds: Counter[str] = Counter()
    for stack, count in stacks.items():
        kinds[kind_of(stack.split(";"))] += count
    inside = sum(count for stack, count in stacks.items() if within is not None and within in stack)
    return Share(role, cpu_s, {kind: kinds[kind] / total for kind in KINDS}, inside / total)


class Run:
    """A run of the launcher in a folder, and its steps as they are written."""

    def __init__(self, topology: Path, overrides: Sequence[str], folder: Path) -> None:
        sets = [*overrides, f"run_dir={folder}", "name=profile", "data.held_out=null", "evaluation.every_steps=null"]
        words = [word for one in sets for word in ("--set", one)]
        command = [sys.executable, "-m", "opd_async.launch", "--topology", str(topology), *words]
        self.folder = folder / "profile"
        self._log = (folder / "profile.txt").open("wb")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def until_step(self, step: int) -> float:
        """Wait for a step to be done; returns the tokens trained by then. `SystemExit` that says where to look."""
        give_up = time.monotonic() + START_S + STEP_S * step
        while time.monotonic() < give_up and self._process.poll() is None:
            rows = list(read_jsonl(self.folder / "metrics.jsonl")) if (self.folder / "metrics.jsonl").exists() else []
            if len(rows) >= step:
                return float(sum(row["tokens"] for row in rows[:step]))
            time.sleep(0.2)
        raise SystemExit(f"the run did not come to step {step}; see {self._log.name}")

    def processes(self) -> dict[str, psutil.Process]:
        """Launcher, engines, actors, intake and learner ranks, by the names of their logs."""
        launcher = psutil.Process(self._process.pid)
        return {"launcher": launcher} | dict(_named(launcher))

    def end(self) -> None:
        """Stop the run, which is of no more use, with all its processes."""
        self._process.terminate()
        try:
            self._process.wait(START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def _named(launcher: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    for process in launcher.children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:  # a child of a child that ended meanwhile
            continue
        module = next((word for word in words if word.startswith("opd_async.")), "")
        if module == "opd_async.actors.engine.server":
            yield f"engine of {Path(words[words.index('--model-path') + 1]).name}", process
        elif module == "opd_async.learner.main":
            yield "learner", process
        elif module.startswith("opd_async.actors."):
            yield module.rpartition(".")[2], process


def cpu_s(process: psutil.Process) -> float:
    """Processor seconds of a process so far, the kernel's work for it included."""
    times = process.cpu_times()
    return float(times.user + times.system)


def measure(options: argparse.Namespace, folder: Path) -> list[Share]:
    """Run, look at every process between two steps, and deal out what they spent."""
    run = Run(options.topology, [*options.set, f"schedule.steps={options.from_step + options.steps + 2}"], folder)
    try:
        return _measured(run, options, folder)
    finally:
        run.end()


def _measured(run: Run, options: argparse.Namespace, folder: Path) -> list[Share]:
    began_tokens = run.until_step(options.from_step)
    processes = run.processes()
    began = {role: cpu_s(process) for role, process in processes.items()}
    spies = {role: _spy(options, process.pid, folder / f"{role}.raw") for role, process in processes.items()}
    tokens = run.until_step(options.from_step + options.steps) - began_tokens
    spent = {role: cpu_s(process) - began[role] for role, process in processes.items()}
    for spy in spies.values():
        spy.send_signal(2)  # it writes what it has
    for spy in spies.values():
        spy.wait(60)
    stacks = {role: _stacks(folder / f"{role}.raw") for role in processes}
    return [share_of(role, spent[role] * 1000 / tokens, stacks[role], options.within) for role in processes]


def _stacks(file: Path) -> Counter[str]:
    return read_samples(file.read_text(encoding="utf-8", errors="replace")) if file.exists() else Counter()


def _spy(options: argparse.Namespace, pid: int, file: Path) -> subprocess.Popen[bytes]:
    command = [str(options.py_spy), "record", "--pid", str(pid), "--format", "raw", "--output", str(file)]
    command += ["--rate", str(options.rate), "--duration", "unlimited", "--nonblocking", "--full-filenames"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def table(shares: Sequence[Share]) -> str:
    """Markdown: processor milliseconds for a thousand trained tokens, by process and kind of work."""
    lines = ["| process | " + " | ".join(KINDS) + " | all |", "|---|" + "---:|" * (len(KINDS) + 1)]
    for share in sorted(shares, key=lambda one: -one.cpu_s):
        cells = [f"{1000 * share.cpu_s * share.kinds[kind]:.1f}" for kind in KINDS]
        lines.append(f"| {share.role} | " + " | ".join(cells) + f" | {1000 * share.cpu_s:.1f} |")
    sums = [1000 * sum(share.cpu_s * share.kinds[kind] for share in shares) for kind in KINDS]
    lines.append("| all | " + " | ".join(f"{one:.1f}" for one in [*sums, sum(sums)]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description="Processor seconds by kind of work.")
    parser.add_argument("--topology", type=Path, default=Path("examples/quickstart.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--py-spy", type=Path, required=True, help="the program")
    parser.add_argument("--from-step", type=int, default=10, help="look from the end of this step")
    parser.add_argument("--steps", type=int, default=40, help="over so many steps")
    parser.add_argument("--rate", type=int, default=50, help="samples a second of each process")
    parser.add_argument("--within", metavar="PART", help="and the share of stacks with this in the name of a file")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        shares = measure(options, Path(name))
    print(table(shares))
    if options.within is not None:
        inside, whole = sum(share.cpu_s * share.within for share in shares), sum(share.cpu_s for share in shares)
        print(f"{options.within}: {1000 * inside:.2f} of {1000 * whole:.1f} ms, {inside / whole:.2%}")
    if options.json is not None:
        write_atomically(options.json, json.dumps([dataclasses.asdict(one) for one in shares], indent=2).encode())


if __name__ == "__main__":
    main()
