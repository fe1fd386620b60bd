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
    "malformed_frames",
    "malformed_chunks",
    "duplicate_chunks",
    "stale_attempt_chunks",
)


SUMMED = (
    "tokens",
    "completed",
    "cuts",
    "forwarded_tokens",
    "recomputed_tokens",
    "weight_sync_s",
    "engines_blocked_s",
    "learner_idle_s",
)
"""Columns of metrics.jsonl whose sums the report needs."""


@dataclass(slots=True)
class RoleTotals:
    """Counters of one role over all its incarnations: they restart from zero with the process."""

    before: dict[str, float] = field(default_factory=dict)
    now: dict[str, float] = field(default_factory=dict)

    def restart(self) -> None:
        """The process is a new one."""
        for name, value in self.now.items():
            self.before[name] = self.before.get(name, 0.0) + value
        self.now = {}

    def total(self, name: str) -> float:
        """Sum over incarnations."""
        return self.before.get(name, 0.0) + self.now.get(name, 0.0)


@dataclass(slots=True)
class Ledger:
    """Figures of one launch. `start_training` and `end_training` bound the window of rates and shares."""

    plan: Plan
    roles: dict[str, RoleTotals] = field(default_factory=lambda: defaultdict(RoleTotals))
    evaluations: list[Evaluation] = field(default_factory=list)
    teachers: dict[str, Evaluation] = field(default_factory=dict)
    student_before: Evaluation | None = None
    student_after: Evaluation | None = None
    reverse_kl: list[tuple[int, float]] = field(default_factory=list)
    staleness: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros(1, np.int64))
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: int = 0
    skipped_prompts: int = 0
    complain: Callable[[str], None] = log.warning
    _writer: JsonlRecord | None = None
    _window: list[float] = field(default_factory=list)
    _at_start: dict[str, dict[str, float]] = field(default_factory=dict)

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
        """Rates and idle shares count from here."""
        if self._window:  # the learner went back to a checkpoint: the window goes on
            return
        self._window = [time.monotonic()]
        self._at_start = {name: self._snapshot(totals) for name, totals in self.roles.items()}

    def end_training(self) -> None:
        """Rates and idle shares count to here."""
        self._window = [self._window[0], time.monotonic()]

    @staticmethod
    def _snapshot(totals: RoleTotals) -> dict[str, float]:
        return {name: totals.total(name) for name in {*totals.before, *totals.now}}

    def step(self, started: StepStarted, learner: dict[str, float], sync_s: float, engines_s: float) -> None:
        """One optimizer step is done and its weights are in the engines; writes a row of metrics.jsonl."""
        step = started.version + 1
        row = {
            "step": step,
            "time": time.time(),
            **started.stats,
            "weight_sync_s": sync_s,
            "engines_blocked_s": engines_s,
        }
        row |= {f"learner_{name}": value for name, value in learner.items()}
        self._add(row | {"staleness_counts": started.staleness_counts.tolist()})
        self._write(row | {"staleness_counts": started.staleness_counts.tolist()})

    def _add(self, row: dict[str, Any]) -> None:
        """Account for one step's row."""
        self.steps += 1
        counts = np.array(row["staleness_counts"], np.int64)
        total = np.zeros(max(len(self.staleness), len(counts)), np.int64)
        total[: len(self.staleness)] += self.staleness
        total[: len(counts)] += counts
        self.staleness = total
        for name in SUMMED:
            self.sums[name] += row.get(name) or 0.0
        reverse_kl = row.get("learner_reverse_kl")
        if reverse_kl is not None and self.plan.topology.opd.use_opd:
            self.reverse_kl.append((row["step"], reverse_kl))

    def evaluation(self, evaluation: Evaluation, who: str) -> None:
        """File one evaluation of the `student`, the `teacher`, or `teacher <name>` where there are several."""
        if who != "student":
            self.teachers[who] = evaluation
        else:
            self.evaluations.append(evaluation)
        self._write({"time": time.time(), "evaluation": who, **evaluation.model_dump(mode="json")})

    def rewind(self, version: int) -> None:
        """Go back to what was measured up to `version`, on disk too: later steps will be taken again."""
        path = self.path
        rows = list(read_jsonl(path)) if path.exists() else []
        self.close()
        kept = [row for row in rows if row.get("step", 0) <= version]
        self._writer = JsonlRecord(path, self.complain, kept)
        self.evaluations, self.reverse_kl = [], []
        self.teachers, self.student_before = {}, None
        self.staleness, self.sums, self.steps = np.zeros(1, np.int64), defaultdict(float), 0
        for row in kept:
            if "evaluation" not in row:
                self._add(row)
                continue
            fields = {name: row[name] for name in Evaluation.model_fields if name in row}
            evaluation = Evaluation.model_validate(fields)
            if row["evaluation"] != "student":
                self.teachers[row["evaluation"]] = evaluation
            else:
                self.evaluations.append(evaluation)
                self.student_before = self.student_before or evaluation

    def seconds(self) -> float:
        """Length of the training window so far."""
        if not self._window:
            return 0.0
        return (self._window[1] if len(self._window) > 1 else time.monotonic()) - self._window[0]

    def _in_window(self, kind: RoleKind, counter: str) -> float:
        """Sum of a counter's growth in the window over all roles of a kind."""
        names = [role.name for role in self.plan.of_kind(kind)]
        return sum(
            max(self.roles[name].total(counter) - self._at_start.get(name, {}).get(counter, 0.0), 0.0) for name in names
        )

    def _stage(self, kind: RoleKind) -> Stage:
        seconds = max(self.seconds(), 1e-9)
        replicas = max(len(self.plan.of_kind(kind)), 1)
        tokens = int(self._in_window(kind, "tokens"))
        idle = self._in_window(kind, "idle_s") / seconds / replicas
        return Stage(tokens=tokens, tokens_per_s=tokens / seconds, idle_share=min(max(idle, 0.0), 1.0))

    def _learner_stage(self) -> Stage:
        seconds = max(self.seconds(), 1e-9)
        idle = min(self.sums["learner_idle_s"] / seconds, 1.0)
        return Stage(tokens=int(self.sums["tokens"]), tokens_per_s=self.sums["tokens"] / seconds, idle_share=idle)

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
        cached = self._in_window(RoleKind.TEACHER, "cached_tokens")
        computed = self._in_window(RoleKind.TEACHER, "computed_tokens")
        scored = self._in_window(RoleKind.TEACHER, "tokens")
        tokens = self.sums["tokens"]
        latency = {q: intake.now.get(f"score_latency_{q}") for q in ("p50_s", "p99_s")}
        counters = {name: int(sum(t.total(name) for t in self.roles.values())) for name in SHOWN_COUNTERS}
        return Report(
            name=self.plan.topology.name,
            steps=self.steps,
            seconds=self.seconds(),
            teacher=self.teachers.get("teacher"),
            teachers={name: of for name, of in self.teachers.items() if name != "teacher"},
            student_before=self.student_before,
            student_after=self.student_after,
            max_staleness=self.plan.topology.schedule.max_staleness,
            staleness=self._staleness(),
            score_latency=ScoreLatency(**latency),
            weight_sync=WeightSync(
                blocked_s=self.sums["weight_sync_s"],
                engines_blocked_s=self.sums["engines_blocked_s"],
                updates=self.steps,
            ),
            prefix_hit_share=cached / (cached + computed) if cached + computed else None,
            teacher_recompute=computed / scored if scored else None,
            stages=Stages(
                rollout=self._stage(RoleKind.ROLLOUT),
                teacher=self._stage(RoleKind.TEACHER) if self.plan.of_kind(RoleKind.TEACHER) else None,
                learner=self._learner_stage(),
            ),
            trained_tokens=int(tokens),
            trained_samples=int(self.sums["completed"]),
            cuts=int(self.sums["cuts"]),
            recompute_factor=self.sums["forwarded_tokens"] / tokens if tokens else None,
            skipped_prompts=self.skipped_prompts,
            counters={name: count for name, count in counters.items() if count},
            restarts=restarts,
        )
