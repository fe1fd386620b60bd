"""Whole runs of the quickstart with the learner on this device, by every way of weights that the machine has.

    python -m bench.gpu.pipeline [--ways disk,tensor] [--python .venv-sglang/bin/python] [--tiny] [--json FILE]

    way        learner   engines                       weights
    disk       cuda:0    embedded, on the CPU          files
    tensor     cuda:0    SGLang, both on cuda:0        handles to the learner's memory; needs `--python`
    broadcast  cuda:0    embedded, student on cuda:1   NCCL; needs two GPUs

On the CPU everything is on the CPU: `disk` and `broadcast`, over gloo.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opd_async.bench.gpu.found import Findings, device, end, parse, parser

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"
RUN_S = 420.0
MAX_STALENESS = 1
PASSED = 0.9
"""A run that has learnt: the quickstart's student ends above it."""


def values(way: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """What is set over the quickstart's topology."""
    here, cuda = str(device()), torch.cuda.is_available()
    found: dict[str, object] = {
        "name": way,
        "run_dir": folder,
        "data.train.path": folder / "train.jsonl",
        "data.held_out.path": folder / "held_out.jsonl",
        "schedule.max_staleness": MAX_STALENESS,
        "learner.devices": json.dumps([here]),
        "learner.weight_transport": way,
    }
    if way == "tensor":
        found["shared_devices"] = json.dumps([here])
        for side in ("student", "teacher"):
            keys = {"kind": "sglang", "python": options.python, "devices": json.dumps([here])}
            keys |= {"args": json.dumps(["--mem-fraction-static", "0.25", *options.server_args.split()])}
            found |= {f"engines.{side}.{key}": value for key, value in keys.items()}
    if way == "broadcast" and cuda:
        found["engines.student.devices"] = json.dumps(["cuda:1"])
    if options.tiny:
        found |= {"schedule.steps": 2, "schedule.tokens_per_step": 512, "rollout.slots": 16}
        found |= {"evaluation.prompts": 16, "evaluation.during_prompts": 16, "evaluation.teacher": "false"}
        found |= {"learner.optimizer.warmup_steps": 1, "checkpoint.export_hf": "false"}
    return found


def make_data(folder: Path, tiny: bool) -> None:
    """Write the quickstart's prompts."""
    counts = ["--train", "2000", "--held-out", "100"] if tiny else []
    command = [sys.executable, str(ROOT / "examples" / "addition" / "make_data.py"), "--out", str(folder), *counts]
    subprocess.run(command, cwd=ROOT, timeout=RUN_S, check=True, stdout=subprocess.DEVNULL)


def run(findings: Findings, way: str, options: argparse.Namespace, folder: Path) -> None:
    """One run to its end, and what its report says."""
    words = [word for key, value in values(way, options, folder).items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "opd_async.launch", "--topology", str(QUICKSTART), "--overwrite", *words]
    log = folder / f"{way}.log"
    try:
        with log.open("w") as out:
            done = subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=options.deadline_s, check=False
            ).returncode
    except subprocess.TimeoutExpired:
        done = 124
    findings.check(f"{way}: exit code", done, 0)
    if done:
        findings.figure(f"{way}: last lines", log.read_text()[-2000:])
        return
    report: dict[str, Any] = json.loads((folder / way / "report.json").read_text())
    findings.check(f"{way}: age of the oldest trained token, steps", report["staleness"]["max"], MAX_STALENESS)
    findings.figure(f"{way}: seconds", report["seconds"])
    findings.figure(f"{way}: trained tokens", report["trained_tokens"])
    findings.figure(f"{way}: weight updates", report["weight_sync"])
    after = report["student_after"]["pass_at_1"]
    if options.tiny:
        findings.figure(f"{way}: pass@1", after)
    else:
        findings.check(f"{way}: share of wrong answers", 1 - after, 1 - PASSED)


def ways(options: argparse.Namespace) -> list[str]:
    """Those asked for, or all that the machine has."""
    if options.ways:
        return [str(way) for way in options.ways.split(",")]
    if not torch.cuda.is_available():
        return ["disk", "broadcast"]
    return ["disk", *(["tensor"] if options.python else []), *(["broadcast"] if torch.cuda.device_count() > 1 else [])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every way."""
    made = parser("Whole runs of the quickstart with the learner on this device.")
    made.add_argument("--ways", default="", help="commas between them; all that the machine has if left out")
    made.add_argument("--python", type=Path, help="the Python of an environment with SGLang, for `tensor`")
    made.add_argument("--server-args", default="", help="further arguments of SGLang's servers, spaces between them")
    made.add_argument("--deadline-s", type=float, default=RUN_S, help="of each run")
    options = parse(made, arguments)
    findings = Findings(options.json)
    if not QUICKSTART.is_file():
        raise SystemExit(f"no {QUICKSTART} here: run it from a checkout")
    with tempfile.TemporaryDirectory() as name:
        make_data(Path(name), options.tiny)
        for way in ways(options):
            run(findings, way, options, Path(name))
    end(findings)


if __name__ == "__main__":
    main()
