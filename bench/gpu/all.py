"""Everything that is asked of a GPU, in one command: what is cheapest and tells most comes first.

    python -m bench.gpu.all [--python .venv-sglang/bin/python] [--server-args "..."] [--minutes 25]
                            [--out runs/gpu] [--only step,speed] [--again step] [--tiny]

    order            deadline   it says
    machine          1 min      what this machine is
    varlen           3 min      attention is right, in both dtypes
    step             5 min      a step is the CPU's; a resumed run goes on alike; with two GPUs TP and DP
    speed 0.6B       3 min      tokens/s, share of the peak, memory, profile
    faults           4 min      groups can be given up; a killed engine fails an update in time
    engine           4 min      the embedded engine
    pipeline disk    6 min      the quickstart, learner on the GPU, weights by files
    weights          4 min      two GPUs: NCCL between learner and engine, against a plain broadcast
    engine sglang    10 min     with `--python`: SGLang
    pipeline         8 min      with `--python`: the quickstart on SGLang; with two GPUs by broadcast
    speed 1.7B       4 min      as 0.6B

Each part is a process with a deadline, which is ended with its children when that has passed: no failure takes what
comes after. `<out>/report.json` is written after each; the same command goes on behind the parts that have passed, and
takes those that failed again. `--minutes` bounds the whole: what does not fit is left for the next call.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd_async.bench.gpu.found import parse, parser
from opd_async.bench.gpu.machine import fingerprint
from opd_async.files import write_atomically

TAIL = 4000
"""Characters of a part's output that the report keeps where it failed."""
LEAST_S = 30.0
"""A part is not begun with less time."""
PASSED = "passed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process of the whole."""

    name: str
    module: str
    words: tuple[str, ...] = ()
    minutes: float
    gpus: int = 0
    """It needs so many."""
    sglang: bool = False
    """It needs `--python`."""
    tiny: bool = True
    """It knows `--tiny`; without, it is left out where that was said."""


PARTS = (
    Part(name="machine", module="gpu.machine", minutes=1),
    Part(name="varlen", module="gpu.varlen", minutes=3),
    Part(name="step", module="gpu.step", minutes=5),
    Part(name="speed", module="gpu.speed", words=("--shape", "0.6B"), minutes=3),
    Part(name="faults", module="gpu.faults", minutes=4),
    Part(name="engine", module="gpu.engine", minutes=4),
    Part(name="pipeline", module="gpu.pipeline", words=("--ways", "disk"), minutes=6),
    Part(name="weights", module="weights", minutes=4, gpus=2, tiny=False),
    Part(name="pipeline broadcast", module="gpu.pipeline", words=("--ways", "broadcast"), minutes=6, gpus=2),
    Part(name="engine sglang", module="gpu.engine", minutes=10, gpus=1, sglang=True),
    Part(name="pipeline tensor", module="gpu.pipeline", words=("--ways", "tensor"), minutes=8, gpus=1, sglang=True),
    Part(name="speed 1.7B", module="gpu.speed", words=("--shape", "1.7B"), minutes=4, gpus=1),
    Part(
        name="speed 1.7B, recomputed", module="gpu.speed", words=("--shape", "1.7B", "--recompute"), minutes=4, gpus=1
    ),
)
LEFT_TO_ITSELF = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "PYTHONUNBUFFERED": "1",
}
"""Set unless the caller has: everything is on this host, whose name need not resolve."""


def wanted(options: argparse.Namespace, gpus: int) -> list[Part]:
    """The parts that this machine and these options allow, in order."""
    only = set(options.only.split(",")) if options.only else None
    if only is not None and (unknown := only - {part.name for part in PARTS}):
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: parts are {', '.join(part.name for part in PARTS)}")
    return [
        part
        for part in PARTS
        if (only is None or part.name in only)
        and part.gpus <= gpus
        and (not part.sglang or options.python is not None)
        and (part.tiny or not options.tiny)
    ]


def command_of(part: Part, options: argparse.Namespace, file: Path) -> list[str]:
    """How a part is started."""
    words = [sys.executable, "-m", f"opd_async.bench.{part.module}", *part.words, "--json", str(file)]
    if part.sglang:
        words += ["--python", str(options.python), f"--server-args={options.server_args}"]
    return [*words, "--tiny"] if options.tiny else words


def run(command: Sequence[str], log: Path, seconds: float) -> tuple[str, float]:
    """Run a part to its end or its deadline: `passed`, `failed` or `out of time`, and how long it took."""
    began = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=LEFT_TO_ITSELF | os.environ, start_new_session=True
        )
        try:
            state = "failed" if process.wait(seconds) else PASSED
        except subprocess.TimeoutExpired:
            state = "out of time"
        finally:
            with suppress(ProcessLookupError):  # its children too, which may have outlived it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return state, time.monotonic() - began


def one(part: Part, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a part and collect what it has found, however it ended."""
    stem = part.name.replace(" ", "-").replace(",", "")
    log, file = options.out / f"{stem}.log", options.out / f"{stem}.json"
    file.unlink(missing_ok=True)
    state, took = run(command_of(part, options, file), log, seconds)
    found: dict[str, Any] = {"state": state, "seconds": round(took, 1)}
    if file.is_file():
        found["found"] = json.loads(file.read_text())
    if state != PASSED:
        found["tail"] = log.read_text(errors="replace")[-TAIL:]
    return found


def before(file: Path, who: str, again: set[str]) -> dict[str, Any]:
    """Parts of an earlier call that need not be run again: they passed, on a machine like this one."""
    if not file.is_file():
        return {}
    report = json.loads(file.read_text())
    if report["fingerprint"] != who:
        return {}
    return {name: part for name, part in report["parts"].items() if part["state"] == PASSED and name not in again}


def summary(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each part, and its failed checks below it."""
    lines = []
    for name, part in parts.items():
        lines.append(f"{name:<24} {part['state']:<12} {part.get('seconds', 0):>6.0f} s")
        checks = part.get("found", {}).get("checks", [])
        lines += [f"    {c['name']}: {c['value']:.4g}, at most {c['limit']:g}" for c in checks if not c["passed"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has not passed yet; exit code 1 if a part failed or was left out for want of time."""
    made = parser("Everything that is asked of a GPU.")
    made.add_argument("--out", type=Path, default=Path("runs/gpu"), help="where report and logs go")
    made.add_argument("--python", type=Path, help="the Python of an environment with SGLang")
    made.add_argument("--server-args", default="", help="further arguments of SGLang's servers, spaces between them")
    made.add_argument("--minutes", type=float, default=25.0, help="no part goes on after so many")
    made.add_argument("--only", default="", help="these parts, commas between them")
    made.add_argument("--again", default="", help="these parts too, though they have passed")
    options = parse(made, arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `run` ends its part
    file, who = options.json or options.out / "report.json", fingerprint() + ("; tiny" if options.tiny else "")
    give_up = time.monotonic() + 60 * options.minutes
    done = before(file, who, set(options.again.split(",")))
    chosen = wanted(options, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for part in chosen:
        if part.name in done:
            continue
        left = give_up - time.monotonic()
        if left < LEAST_S:
            done[part.name] = {"state": "no time left"}
        else:
            print(f"{part.name} ...", flush=True)
            done[part.name] = one(part, options, min(left, 60 * part.minutes))
        report = {"fingerprint": who, "tiny": options.tiny, "parts": done}
        write_atomically(file, json.dumps(report, indent=1).encode())
    print(summary(done))
    if any(done[part.name]["state"] != PASSED for part in chosen):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
