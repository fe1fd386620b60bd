"""One cell as a run of the launcher, and what is read from the run's folder afterwards."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_async.bench.learning.cells import CURVE_STEPS, REGIMES, SAMPLES_PER_STEP, Cell
from opd_async.bench.learning.inputs import ADDITION, Inputs

ROOT = ADDITION.parents[1]
DEADLINE_S = 1800.0
PROMPT_TOKENS_AND_MARGIN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run showed. Shares between 0 and 1."""

    cell: Cell
    steps: list[int]
    """Steps after which the student was evaluated."""
    seen: list[int]
    """Tokens trained until then."""
    sampled: list[float]
    """pass@1 at T = 1 after these."""
    greedy: list[float]
    staleness_mean: float
    staleness_max: int
    ratio_std: float
    """Standard deviation of p / mu over a step's tokens, the largest of all steps: how far the student had drifted."""
    tokens: int
    """Trained."""
    seconds: float

    def after(self, tokens: int) -> float:
        """pass@1, sampled, after so many trained tokens: on the line between the evaluations around it."""
        return float(np.interp(tokens, self.seen, self.sampled))

    @property
    def budgets(self) -> float:
        """The mean size of a step in `tokens_per_step`."""
        return self.tokens / self.steps[-1] / tokens_per_step(self.cell)

    @property
    def lowest(self) -> float:
        """The lowest greedy pass@1 after the start: a collapse that was made good again shows here."""
        return min(self.greedy[1:])


def response_tokens(cell: Cell) -> int:
    """The longest response that a correct one can be."""
    return 10 * REGIMES[cell.regime].digits + 2


def tokens_per_step(cell: Cell) -> int:
    """The budget of a step of a cell that trains on tokens."""
    return REGIMES[cell.regime].samples * response_tokens(cell)


def settings(cell: Cell, inputs: Inputs, out: Path) -> list[str]:
    """The launcher's arguments for a cell."""
    regime, how = REGIMES[cell.regime], cell.how
    response = response_tokens(cell)
    context = response + 2 * regime.digits + PROMPT_TOKENS_AND_MARGIN
    values = [
        f"name={cell.name}",
        f"run_dir={out}",
        f"seed={cell.seed}",
        f"models.student.path={inputs.student}",
        *([] if how.of_itself else [f"models.teacher.path={inputs.teacher}"]),
        f"data.train.path={inputs.train}",
        f"data.held_out.path={inputs.held_out}",
        f"rollout.sampling.max_response_tokens={response}",
        f"rollout.slots={cell.slots}",
        f"schedule.steps={regime.steps}",
        f"schedule.train_on={cell.train_on}",
        f"schedule.rule={cell.rule}",
        f"schedule.max_staleness={'null' if cell.staleness is None else cell.staleness}",
        f"learner.optimizer.lr={cell.lr}",
        f"learner.optimizer.warmup_steps={regime.warmup}",
        f"evaluation.every_steps={CURVE_STEPS}",
        "evaluation.during_prompts=500",
        "evaluation.teacher=false",
        "checkpoint.every_steps=1000",
        "checkpoint.export_hf=false",
        *how.settings,
        *cell.extra,
    ]
    running = max(256, cell.slots)
    sides = ("student",) if how.teacher_inside or how.of_itself else ("student", "teacher")
    for side in sides:
        sizes = {"context_tokens": context, "kv_tokens": running * context, "max_running": running}
        values += [f"engines.{side}.{key}={value}" for key, value in sizes.items()]
    if cell.train_on == "samples":
        values += [f"schedule.samples_per_step={SAMPLES_PER_STEP}", f"rollout.group_size={how.group}"]
    else:
        values.append(f"schedule.tokens_per_step={tokens_per_step(cell)}")
    if how.given:
        values += [f"data.completions.path={inputs.given}", "opd.gkd_lambda=0"]
    if how.teacher_inside:
        values.append(f"opd.teacher_load={inputs.teacher_checkpoint}")
    return [*how.options, *(part for value in values for part in ("--set", value))]


def run(cell: Cell, inputs: Inputs, out: Path) -> None:
    """Run the launcher to its end, its output in a file beside the run; `RuntimeError` with that file if it fails."""
    topology = REGIMES[cell.regime].topology
    command = [sys.executable, "-m", "opd_async.launch", "--topology", topology, "--overwrite"]
    log = out / f"{cell.name}.log"
    out.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            [*command, *settings(cell, inputs, out)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE_S,
        )
    if done.returncode:
        raise RuntimeError(
            f"{cell.name} ended with exit code {done.returncode}: {log.read_text()[-500:]} (all of it: {log})"
        )


def outcome(cell: Cell, out: Path) -> Outcome | None:
    """What a cell's run left behind; None if it has not been run to its end."""
    folder = out / cell.name
    if not (folder / "report.json").is_file():
        return None
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = sorted((row for row in rows if row.get("evaluation") == "student"), key=lambda row: row["step"])
    trained = {int(row["step"]): int(row["tokens"]) for row in rows if "tokens" in row}
    ratios = [row["learner_ratio_std"] for row in rows if "learner_ratio_std" in row]
    return Outcome(
        cell=cell,
        steps=[row["step"] for row in found],
        seen=[sum(tokens for step, tokens in trained.items() if step <= row["step"]) for row in found],
        sampled=[row["pass_at_1"] for row in found],
        greedy=[row["pass_at_1_greedy"] for row in found],
        staleness_mean=report["staleness"]["mean"],
        staleness_max=report["staleness"]["max"],
        ratio_std=max((value for value in ratios if math.isfinite(value)), default=math.nan),
        tokens=report["trained_tokens"],
        seconds=report["seconds"],
    )
