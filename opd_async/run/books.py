"""Sums that a run keeps: columns of metrics.jsonl over steps, counters of a role over its processes, and what a
checkpoint holds of them.

A run that goes on takes the sums of its checkpoint and reads metrics.jsonl from there, however many steps came before.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opd_async.files import write_atomically
from opd_async.plan.plan import RoleKind
from opd_async.telemetry.report import Evaluation, Stage, Stages, Staleness

BOOKS_FILE = "ledger.json"
"""In a checkpoint: the `Books` of its step."""

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
    sizes: tuple[float, float] | None = None
    """The smallest and the largest `budget_share`; None where steps have no budget."""

    def add(self, row: dict[str, Any]) -> None:
        """Account for one step's row."""
        self.first = self.first or int(row["step"])
        self.steps += 1
        for name in SUMMED:
            self.of[name] += row.get(name) or 0.0
        if (size := row.get("budget_share")) is not None:
            least, most = self.sizes or (size, size)
            self.sizes = (min(least, size), max(most, size))

    def dump(self) -> dict[str, Any]:
        """As values of JSON."""
        return {"first": self.first, "steps": self.steps, "of": dict(self.of), "sizes": self.sizes}

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


Counts = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(slots=True, kw_only=True)
class Books:
    """Everything that a report needs of the rows so far."""

    size: int = 0
    """Bytes of metrics.jsonl that these rows are."""
    began: int | None = None
    """The step that the launch went on from, None before it knows."""
    whole: Sums = field(default_factory=Sums)
    """Over the whole run."""
    launch: Sums = field(default_factory=Sums)
    """Over the steps of this launch."""
    staleness: Counts = field(default_factory=lambda: np.zeros(1, np.int64))
    """Trained tokens by their age in steps."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Of the student, in the order in which they ended."""
    teachers: dict[str, dict[str, Evaluation]] = field(default_factory=dict)
    """Of each teacher, by evaluation set and by who it is."""
    before: dict[str, Evaluation] = field(default_factory=dict)
    """Of the untrained student, by set."""

    def step(self, row: dict[str, Any]) -> None:
        """Account for one step's row."""
        self.whole.add(row)
        if row["step"] > (self.began or 0):
            self.launch.add(row)
        counts = np.array(row["staleness_counts"], np.int64)
        total = np.zeros(max(len(self.staleness), len(counts)), np.int64)
        total[: len(self.staleness)] += self.staleness
        total[: len(counts)] += counts
        self.staleness = total

    def evaluation(self, evaluation: Evaluation, who: str) -> None:
        """Account for one evaluation of the `student`, the `teacher`, or `teacher <name>` where there are several."""
        if who != "student":
            self.teachers.setdefault(evaluation.set, {})[who] = evaluation
            return
        self.evaluations.append(evaluation)
        if evaluation.step == 0:
            self.before.setdefault(evaluation.set, evaluation)

    def latest(self) -> dict[str, Evaluation]:
        """The student's last evaluation on each set."""
        return {one.set: one for one in self.evaluations}

    def ages(self) -> Staleness:
        """Mean, 99th percentile and maximum of the trained tokens' ages."""
        total = int(self.staleness.sum())
        if total == 0:
            return Staleness()
        ages = np.arange(len(self.staleness))
        p99 = int(np.searchsorted(np.cumsum(self.staleness), 0.99 * total))
        return Staleness(mean=float(ages @ self.staleness / total), p99=p99, max=int(np.nonzero(self.staleness)[0][-1]))

    def row(self, row: dict[str, Any]) -> None:
        """Account for one row of metrics.jsonl, of either kind."""
        if "evaluation" in row:
            values = {name: row[name] for name in Evaluation.model_fields if name in row}
            self.evaluation(Evaluation.model_validate(values), row["evaluation"])
        else:
            self.step(row)

    def dump(self) -> str:
        """As JSON."""
        values = {
            "size": self.size,
            "began": self.began,
            "whole": self.whole.dump(),
            "launch": self.launch.dump(),
            "staleness": self.staleness.tolist(),
            "evaluations": [one.model_dump(mode="json") for one in self.evaluations],
            "teachers": {name: _dumped(of) for name, of in self.teachers.items()},
            "before": _dumped(self.before),
        }
        return json.dumps(values)

    def save(self, checkpoint: Path) -> None:
        """Write them into a checkpoint's folder, which exists; raises `OSError`."""
        write_atomically(checkpoint / BOOKS_FILE, self.dump())


def load_books(checkpoint: Path | None) -> Books:
    """What `Books.save` wrote; empty ones where there is no checkpoint, or one of somebody who keeps no books."""
    try:
        if checkpoint is None:
            return Books()
        values = json.loads((checkpoint / BOOKS_FILE).read_bytes())
        return Books(
            size=int(values["size"]),
            began=values["began"],
            whole=_sums(values["whole"]),
            launch=_sums(values["launch"]),
            staleness=np.array(values["staleness"], np.int64),
            evaluations=[Evaluation.model_validate(one) for one in values["evaluations"]],
            teachers={name: _evaluations(of) for name, of in values["teachers"].items()},
            before=_evaluations(values["before"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return Books()


def _dumped(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    return {name: one.model_dump(mode="json") for name, one in evaluations.items()}


def _evaluations(values: dict[str, Any]) -> dict[str, Evaluation]:
    return {name: Evaluation.model_validate(one) for name, one in values.items()}


def _sums(values: dict[str, Any]) -> Sums:
    sizes = values.get("sizes")  # not in books of before they were kept
    sums = Sums(
        first=int(values["first"]), steps=int(values["steps"]), sizes=sizes and (float(sizes[0]), float(sizes[1]))
    )
    sums.of.update(values["of"])
    return sums
