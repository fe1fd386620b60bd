"""What happened in a run: counters of every role, one row per step, and the report made from them.

heartbeats, steps, weight updates, evaluations -> Ledger -> metrics.jsonl, learning curve, report.json
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd_async.data.jsonl import JsonlRecord, read_jsonl
from opd_async.plan.plan import Plan, RoleKind
from opd_async.telemetry.report import (
    METRICS_FILE,
    Evaluation,
    Launch,
    Report,
    ScoreLatency,
    Stage,
    Stages,
    Staleness,
    WeightSync,
)
from opd_async.transport.messages import StepStarted

log = logging.getLogger(__name__)

SHOWN_COUNTERS = (
    "reward_failures",
    "engine_errors",
    "resent_chunks",
    "teacher_retries",
    "canaries_failed",
    "orphan_chunks",
    "strangers",
    "malformed_frames",
    "malformed_chunks",
    "duplicate_chunks",
    "stale_attempt_chunks",
)


GROWING = {
    "rollout_tokens": (RoleKind.ROLLOUT, "tokens"),
    "rollout_idle_s": (RoleKind.ROLLOUT, "idle_s"),
    "teacher_tokens": (RoleKind.TEACHER, "tokens"),
    "teacher_idle_s": (RoleKind.TEACHER, "idle_s"),
    "teacher_cached_tokens": (RoleKind.TEACHER, "cached_tokens"),
    "teacher_computed_tokens": (RoleKind.TEACHER, "computed_tokens"),
}
"""Columns that say what a stage did since the row before, and the roles' counter that each is taken from."""
PER_ROLE = ("rollout_idle_s", "teacher_idle_s")
"""Those that are a mean over the stage's roles; the others are sums."""
SINCE = ("seconds", *GROWING)
"""Columns that count from the row before. What is lost when the learner goes back to a checkpoint is in the next."""
SUMMED = (
    "tokens",
    "completed",
    "cuts",
    "forwarded_tokens",
    "recomputed_tokens",
    "weight_sync_s",
    "engines_blocked_s",
    "learner_idle_s",
    *SINCE,
)
"""Columns of metrics.jsonl whose sums the report needs."""


@dataclass(slots=True)
class Sums:
    """Sums of columns over steps that follow one another."""

    first: int = 0
    """The first of the steps, counted from 1; 0 while there is none."""
    steps: int = 0
    of: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, row: dict[str, Any]) -> None:
        """Account for one step's row."""
        self.first = self.first or int(row["step"])
        self.steps += 1
        for name in SUMMED:
            self.of[name] += row.get(name) or 0.0

    def stage(self, name: str, tokens: str) -> Stage:
        """Throughput of a stage; `tokens` is the column that counts its tokens."""
        seconds = max(self.of["seconds"], 1e-9)
        idle = self.of[f"{name}_idle_s"] / seconds
        return Stage(
            tokens=int(self.of[tokens]), tokens_per_s=self.of[tokens] / seconds, idle_share=min(max(idle, 0.0), 1.0)
        )

    def stages(self, with_teacher: bool) -> Stages:
        """All three."""
        teacher = self.stage("teacher", "teacher_tokens") if with_teacher else None
        rollout, learner = self.stage("rollout", "rollout_tokens"), self.stage("learner", "tokens")
        return Stages(rollout=rollout, teacher=teacher, learner=learner)


@dataclass(slots=True)
class RoleTotals:
    """Counters of one role over all its incarnations: they restart from zero with the process."""

    before: dict[str, float] = field(default_factory=dict)
    now: dict[str, float] = field(default_factory=dict)

    def restart(self) -> None:
        """Note that the process is a new one: its counters begin at 0 again."""
        for name, value in self.now.items():
            self.before[name] = self.before.get(name, 0.0) + value
        self.now = {}

    def total(self, name: str) -> float:
        """Sum of a counter over all processes that this role has been."""
        return self.before.get(name, 0.0) + self.now.get(name, 0.0)


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Figures of a run, and of this launch alone where it goes on with one. Rates and shares count from
    `start_training` to the last step."""

    plan: Plan
    roles: dict[str, RoleTotals] = field(default_factory=lambda: defaultdict(RoleTotals))
    evaluations: list[Evaluation] = field(default_factory=list)
    teachers: dict[str, Evaluation] = field(default_factory=dict)
    student_before: Evaluation | None = None
    student_after: Evaluation | None = None
    reverse_kl: list[tuple[int, float]] = field(default_factory=list)
    staleness: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(1, np.int64))
    whole: Sums = field(default_factory=Sums)
    launch: Sums = field(default_factory=Sums)
    skipped_prompts: int = 0
    complain: Callable[[str], None] = log.warning
    on_row: Callable[[str, dict[str, Any]], None] = lambda kind, row: None
    """Called with each new row, `step` or `evaluation`; not with those that a resumed run writes again."""
    _writer: JsonlRecord | None = None
    _began: int | None = None
    """The step that this launch went on from."""
    _mark: dict[str, float] | None = None
    """What the columns in `SINCE` count from: the clock, and the roles' counters at the last row."""
    _carried: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Time and work that was lost with the learner, for the next row."""

    @property
    def path(self) -> Path:
        """One JSON object per step and per evaluation."""
        return self.plan.run_folder / METRICS_FILE

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, row: dict[str, Any]) -> None:
        assert self._writer is not None, "rewind opens the file"
        self._writer.write(row)

    def start_training(self) -> None:
        """Rates and idle shares count from here, or go on where the learner went back to a checkpoint."""
        if self._mark is None:
            self._mark = self._now()

    def _now(self) -> dict[str, float]:
        now = {"seconds": time.monotonic()}
        for column, (kind, counter) in GROWING.items():
            roles = self.plan.of_kind(kind)
            total = sum(self.roles[role.name].total(counter) for role in roles)
            now[column] = total / max(len(roles), 1) if column in PER_ROLE else total
        return now

    def _since(self) -> dict[str, float]:
        """The columns in `SINCE` of the row that is written now."""
        before, self._mark = self._mark or self._now(), self._now()
        found = {name: max(self._mark[name] - before[name], 0.0) + self._carried[name] for name in SINCE}
        self._carried.clear()
        return found

    def step(self, started: StepStarted, learner: dict[str, float], sync_s: float, engines_s: float) -> None:
        """One optimizer step is done and its weights are in the engines; writes a row of metrics.jsonl."""
        step = started.version + 1
        row = {
            "step": step,
            "time": time.time(),
            **started.stats,
            **self._since(),
            "weight_sync_s": sync_s,
            "engines_blocked_s": engines_s,
        }
        row |= {f"learner_{name}": value for name, value in learner.items()}
        self._add(row | {"staleness_counts": started.staleness_counts.tolist()})
        self._write(row | {"staleness_counts": started.staleness_counts.tolist()})
        self.on_row("step", row | {"staleness_counts": started.staleness_counts.tolist()})

    def _add(self, row: dict[str, Any]) -> None:
        self.whole.add(row)
        if row["step"] > (self._began or 0):
            self.launch.add(row)
        counts = np.array(row["staleness_counts"], np.int64)
        total = np.zeros(max(len(self.staleness), len(counts)), np.int64)
        total[: len(self.staleness)] += self.staleness
        total[: len(counts)] += counts
        self.staleness = total
        reverse_kl = row.get("learner_reverse_kl")
        if reverse_kl is not None:
            self.reverse_kl.append((row["step"], reverse_kl))

    def evaluation(self, evaluation: Evaluation, who: str) -> None:
        """File one evaluation of the `student`, the `teacher`, or `teacher <name>` where there are several."""
        self._file(evaluation, who)
        row = {"time": time.time(), "evaluation": who, **evaluation.model_dump(mode="json")}
        self._write(row)
        self.on_row("evaluation", row)

    def rewind(self, version: int) -> None:
        """Go back to what was measured up to `version`, on disk too: later steps will be taken again."""
        rows = list(read_jsonl(self.path)) if self.path.exists() else []
        self.close()
        kept = [row for row in rows if row.get("step", 0) <= version]
        self._writer = JsonlRecord(self.path, self.complain, kept)
        if self._began is not None:
            self._carry([row for row in rows if row.get("step", 0) > max(version, self._began)])
        self._began = version if self._began is None else min(self._began, version)
        self.evaluations, self.reverse_kl = [], []
        self.teachers, self.student_before = {}, None
        self.staleness, self.whole, self.launch = np.zeros(1, np.int64), Sums(), Sums()
        for row in kept:
            if "evaluation" in row:
                self._file(_evaluation(row), row["evaluation"])
            else:
                self._add(row)

    def _carry(self, lost: list[dict[str, Any]]) -> None:
        """Steps of this launch will be taken again: the time and work that they took are the next row's."""
        for row in lost:
            for name in SINCE:
                self._carried[name] += row.get(name) or 0.0

    def _file(self, evaluation: Evaluation, who: str) -> None:
        if who != "student":
            self.teachers[who] = evaluation
            return
        self.evaluations.append(evaluation)
        if evaluation.step == 0 and self.student_before is None:
            self.student_before = evaluation

    def evaluated(self, step: int, prompts: int, samples: int, temperature: float) -> Evaluation | None:
        """The student's evaluation after `step` on so many prompts, if there is one already."""
        wanted = (step, prompts, samples, temperature)
        found = [
            one
            for one in self.evaluations
            if (one.step, one.prompts, one.samples_per_prompt, one.temperature) == wanted
        ]
        return found[-1] if found else None

    def _staleness(self) -> Staleness:
        total = int(self.staleness.sum())
        if total == 0:
            return Staleness()
        ages = np.arange(len(self.staleness))
        p99 = int(np.searchsorted(np.cumsum(self.staleness), 0.99 * total))
        return Staleness(mean=float(ages @ self.staleness / total), p99=p99, max=int(np.nonzero(self.staleness)[0][-1]))

    def report(self, restarts: dict[str, int]) -> Report:
        """The report of what was measured so far."""
        intake = self.roles[self.plan.of_kind(RoleKind.INTAKE)[0].name]
        sums, teachers = self.whole.of, bool(self.plan.of_kind(RoleKind.TEACHER))
        cached, computed = sums["teacher_cached_tokens"], sums["teacher_computed_tokens"]
        tokens = sums["tokens"]
        latency = {q: intake.now.get(f"score_latency_{q}") for q in ("p50_s", "p99_s")}
        counters = {name: int(sum(t.total(name) for t in self.roles.values())) for name in SHOWN_COUNTERS}
        return Report(
            name=self.plan.topology.name,
            steps=self.whole.steps,
            seconds=sums["seconds"],
            this_launch=self._this_launch() if self._began else None,
            teacher=self.teachers.get("teacher"),
            teachers={name: of for name, of in self.teachers.items() if name != "teacher"},
            student_before=self.student_before,
            student_after=self.student_after,
            max_staleness=self.plan.topology.schedule.max_staleness,
            staleness=self._staleness(),
            score_latency=ScoreLatency(**latency),
            weight_sync=WeightSync(
                blocked_s=sums["weight_sync_s"], engines_blocked_s=sums["engines_blocked_s"], updates=self.whole.steps
            ),
            prefix_hit_share=cached / (cached + computed) if cached + computed else None,
            teacher_recompute=computed / sums["teacher_tokens"] if sums["teacher_tokens"] else None,
            stages=self.whole.stages(teachers),
            trained_tokens=int(tokens),
            trained_samples=int(sums["completed"]),
            cuts=int(sums["cuts"]),
            recompute_factor=sums["forwarded_tokens"] / tokens if tokens else None,
            skipped_prompts=self.skipped_prompts,
            counters={name: count for name, count in counters.items() if count},
            restarts=restarts,
        )

    def _this_launch(self) -> Launch:
        sums = self.launch
        return Launch(
            first_step=sums.first,
            steps=sums.steps,
            seconds=sums.of["seconds"],
            stages=sums.stages(bool(self.plan.of_kind(RoleKind.TEACHER))),
            trained_tokens=int(sums.of["tokens"]),
            trained_samples=int(sums.of["completed"]),
        )


def _evaluation(row: dict[str, Any]) -> Evaluation:
    """The evaluation in a row of metrics.jsonl."""
    return Evaluation.model_validate({name: row[name] for name in Evaluation.model_fields if name in row})
