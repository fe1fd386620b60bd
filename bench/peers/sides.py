"""Run one side: start it as its users do, and read back what it left.

topology, settings -> python -m opd_async.launch      -> run folder      -> ticks, exported students
                   -> .venv-trl python trl_side.py JOB -> job's folder    -> ticks, saved students
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd_async.bench.peers.curves import Tick, own_ticks
from opd_async.bench.peers.usage import Usage, watched
from opd_async.config.topology import Topology
from opd_async.data.jsonl import read_jsonl

TRL_SCRIPT = Path(__file__).with_name("trl_side.py")
DEADLINE_S = 1800.0
NEVER = 1_000_000


class SideError(Exception):
    """A side did not get to its end; says which, and where its log is."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A tick for each step, the folder of the student after each step that was written, and what it all cost."""

    ticks: Sequence[Tick]
    students: Mapping[int, Path]
    usage: Sequence[Usage] = ()
    age: float = 0.0
    """Mean of all trained tokens, in steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrlJob:
    """What `trl_side.py` is told. What a run of this project has too is the same here, unless a setting says else."""

    folder: str
    student: str
    teacher: str
    prompts: str
    seed: int
    steps: int
    every_steps: int
    batch: int
    """Responses a step."""
    max_response_tokens: int
    lr: float
    warmup_steps: int
    scheduler: str
    scheduler_kwargs: dict[str, float] | None
    beta1: float
    beta2: float
    weight_decay: float
    clip_grad: float
    beta: float = 0.5
    """The divergence: 0 forward KL, 0.5 Jensen-Shannon, 1 reverse KL."""
    processes: int = 1
    """Data-parallel ranks, which share the batch."""
    threads: int = 1
    """Of torch, in each process."""
    bf16: bool = False
    attention: str = "sdpa"
    limit_s: float = 600.0


def trl_job(topology: Topology, folder: Path, every_steps: int, settings: Mapping[str, Any]) -> TrlJob:
    """TRL's job for the models, prompts, batch and optimizer of `topology`, with `settings` over them.

    Raises `ValueError` for a setting that is not a field of `TrlJob`.
    """
    if unknown := settings.keys() - {field.name for field in dataclasses.fields(TrlJob)}:
        raise ValueError(f"TRL's side has no setting {', '.join(sorted(unknown))}")
    train = topology.data.train
    assert topology.models.teacher is not None and train is not None
    optimizer = topology.learner.optimizer
    lr = float(settings.get("lr", optimizer.lr))
    linear = optimizer.decay == "linear"
    job = TrlJob(
        folder=str(folder),
        student=str(topology.models.student.path),
        teacher=str(topology.models.teacher.path),
        prompts=str(train.path),
        seed=topology.seed,
        steps=topology.schedule.steps,
        every_steps=every_steps,
        batch=topology.rollout.slots,
        max_response_tokens=topology.rollout.sampling.max_response_tokens,
        lr=lr,
        warmup_steps=optimizer.warmup_steps,
        scheduler="polynomial" if linear else "constant_with_warmup",
        scheduler_kwargs={"lr_end": lr * optimizer.min_lr_ratio, "power": 1.0} if linear else None,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
    )
    return dataclasses.replace(job, **settings)


def run_trl(python: Path, job: TrlJob) -> Outcome:
    """Train with TRL in the environment of `python`."""
    folder = Path(job.folder)
    folder.mkdir(parents=True)
    file = folder / "job.json"
    file.write_text(json.dumps(dataclasses.asdict(job)))
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.processes))
    command = [str(python), *(ranks if job.processes > 1 else ()), str(TRL_SCRIPT), str(file)]
    usage = _run(command, folder / "log.txt", job.threads)
    ticks = [Tick(int(row.pop("step")), **row) for row in read_jsonl(folder / "clock.jsonl")]
    return Outcome(ticks, students(folder), usage)


def run_own(topology: Path, overrides: Sequence[str], folder: Path, every_steps: int) -> Outcome:
    """Train with this project's launcher, without evaluations and checkpoints; students every so many steps."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sets = [
        *overrides,
        f"run_dir={folder.parent}",
        f"name={folder.name}",
        *("data.held_out=null", "evaluation.every_steps=null"),
        *(f"checkpoint.every_steps={NEVER}", f"checkpoint.keep={NEVER}"),
        f"checkpoint.export_hf_every_steps={every_steps}",
    ]
    words = [word for one in sets for word in ("--set", one)]
    command = [sys.executable, "-m", "opd_async.launch", "--topology", str(topology), *words]
    usage = _run(command, folder.with_suffix(".txt"), 1)
    report = json.loads((folder / "report.json").read_text())
    ticks = own_ticks(read_jsonl(folder / "metrics.jsonl"), report["seconds"])
    found = {**students(folder / "export"), ticks[-1].step: folder / "export"}
    return Outcome(ticks, found, usage, report["staleness"]["mean"])


def students(folder: Path) -> dict[int, Path]:
    """Folders `step_00000010` by their step."""
    return {int(one.name.removeprefix("step_")): one for one in sorted(folder.glob("step_*"))}


def _run(command: Sequence[str], log: Path, threads: int) -> list[Usage]:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("wb") as out:
        done = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            usage = watched(done, DEADLINE_S)
        finally:
            done.kill()
            done.wait()
    if done.returncode != 0:
        raise SideError(f"{command[0]} ... {command[-1]} ended with {done.returncode}; see {log}")
    return usage


def parse_settings(text: str) -> dict[str, Any]:
    """`beta=0.5,threads=2` as a mapping; values are read as YAML."""
    pairs = [one.partition("=") for one in text.split(",") if one]
    return {key: yaml.safe_load(value) for key, _, value in pairs}
