"""What happened in a run: counters of every role, one row per step, and the report made from them.

heartbeats, steps, weight updates, evaluations -> Ledger -> metrics.jsonl, learning curve, report.json
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd_async.config.evaluating import HELD_OUT
from opd_async.config.topology import TrainOn
from opd_async.data.jsonl import JsonlRecord, begins_line, read_jsonl, read_jsonl_ends
from opd_async.plan.plan import Plan, RoleKind
from opd_async.run.books import GROWING, PER_ROLE, SINCE, Books, RoleTotals, Sums, load_books
from opd_async.telemetry.report import (
    METRICS_FILE,
    Evaluated,
    Evaluation,
    Launch,
    Report,
    ScoreLatency,
    Suspect,
    WeightSync,
)
from opd_async.transport.messages import StepStarted

log = logging.getLogger(__name__)

KL_COLUMN = "learner_reverse_kl"
EVALUATED = {
    "evaluation_score": "pass_at_1",
    "evaluation_reverse_kl": "reverse_kl",
    "evaluation_forward_kl": "forward_kl",
}
"""Figures of the last evaluations that each step's row repeats, by column."""
SHOWN_COUNTERS = (
    "reward_failures",
    "episodes_failed",
    "engine_errors",
    "resent_chunks",
    "teacher_retries",
    "canaries_failed",
    "orphan_chunks",
    "strangers",
    "unwritten_rows",
    "unwritten_lines",
    "malformed_frames",
    "malformed_chunks",
    "duplicate_chunks",
    "stale_attempt_chunks",
)


@dataclass(slots=True, kw_only=True)
class Ledger:
    """Figures of a run, and of this launch alone where it goes on with one. Rates and shares count from
    `start_training` to the last step."""

    plan: Plan
    roles: dict[str, RoleTotals] = field(default_factory=lambda: defaultdict(RoleTotals))
    student_after: dict[str, Evaluation] = field(default_factory=dict)
    """By evaluation set."""
    skipped_prompts: int = 0
    slow_engines: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """How often an engine was found to be slow, by role or address."""
    complain: Callable[[str], None] = log.warning
    on_row: Callable[[str, dict[str, Any]], None] = lambda kind, row: None
    """Called with each new row, `step` or `evaluation`."""
    on_unwritten: Callable[[str, int], None] = lambda kind, count: None
    """Called with `row` or `line`, and how many of them no disk took."""
    books: Books = field(default_factory=Books)
    """What the rows so far come to."""
    _writer: JsonlRecord | None = None
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
        if not self._writer.write(row):
            self._unwritten("row", 1)

    def unwritten_lines(self, count: int) -> None:
        """Count lines of roles' logs that no disk took."""
        self._unwritten("line", count)

    def _unwritten(self, kind: str, count: int) -> None:
        mine = self.roles["launcher"].now
        mine[f"unwritten_{kind}s"] = mine.get(f"unwritten_{kind}s", 0.0) + count
        self.on_unwritten(kind, count)

    def start_training(self) -> None:
        """Rates and idle shares count from here, or go on where the learner went back to a checkpoint."""
        if self._mark is None:
            self._mark = self._now()

    def grow(self, plan: Plan) -> None:
        """Take over a plan that has more roles; means over roles go on from where they are."""
        before = self._now()
        self.plan = plan
        if self._mark is not None:
            now = self._now() | {"seconds": before["seconds"]}
            self._mark = {column: self._mark[column] + now[column] - before[column] for column in now}

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

    def step(self, started: StepStarted, learner: dict[str, float], sync_s: float, engines_s: float) -> dict[str, Any]:
        """One optimizer step is done and its weights are in the engines; writes and returns its row."""
        step = started.version + 1
        row: dict[str, Any] = {
            "step": step,
            "time": time.time(),
            **started.stats,
            **self._since(),
            "weight_sync_s": sync_s,
            "engines_blocked_s": engines_s,
        }
        if row["seconds"] > 0.0:
            rate = started.stats["tokens"] / row["seconds"]
            row["tokens_per_device_s"] = rate / max(self.plan.device_count, 1)
            if (planned := self.plan.topology.telemetry.planned_tokens_per_s) is not None:
                row["planned_share"] = rate / planned
        row |= self._last_evaluation()
        row |= {f"learner_{name}": value for name, value in learner.items()}
        row["staleness_counts"] = started.staleness_counts.tolist()
        self.books.step(row)
        self._write(row)
        self.on_row("step", row)
        return row

    def _last_evaluation(self) -> dict[str, dict[str, float]]:
        """What the student's last evaluation has found on each set, as columns of a step's row."""
        latest, columns = self.books.latest(), {}
        for column, figure in EVALUATED.items():
            values = {name: value for name, found in latest.items() if (value := getattr(found, figure)) is not None}
            if values:
                columns[column] = values
        return columns

    def evaluation(self, evaluation: Evaluation, who: str) -> None:
        """File one evaluation of the `student`, the `teacher`, or `teacher <name>` where there are several."""
        self.books.evaluation(evaluation, who)
        row = {"time": time.time(), "evaluation": who, **evaluation.model_dump(mode="json", exclude_none=True)}
        self._write(row)
        self.on_row("evaluation", row)

    def rewind(self, version: int, checkpoint: Path | None = None) -> None:
        """Go back to what was measured up to `version`, on disk too: later steps will be taken again.

        `checkpoint` is the one of that version. Its books say what all the rows before it come to, and only rows
        behind them are read.
        """
        began, self.books = self.books.began, load_books(checkpoint)
        books = self.books
        books.began = version if began is None else min(began, version)
        if version <= books.began:
            books.launch = Sums()
        self.close()
        if not begins_line(self.path, books.size):  # somebody has edited the file
            self.books = books = Books(began=books.began)
        ours = True
        for end, row in read_jsonl_ends(self.path, books.size) if self.path.exists() else ():
            ours = ours and row.get("step", 0) <= version
            if ours:
                books.row(row)
                books.size = end
            elif began is not None and row.get("step", 0) > began:
                self._carry(row)
        self._writer = JsonlRecord(self.path, self.complain, books.size)

    def save(self, checkpoint: Path) -> None:
        """Write the books into a checkpoint, and have the rows before it reach the disk; raises `OSError`."""
        assert self._writer is not None, "rewind opens the file"
        self._writer.sync()
        self.books.size = self._writer.size
        self.books.save(checkpoint)

    def _carry(self, lost: dict[str, Any]) -> None:
        """A step of this launch will be taken again: the time and work that it took are the next row's."""
        for name in SINCE:
            self._carried[name] += lost.get(name) or 0.0

    def evaluated(self, step: int, name: str, prompts: int, samples: int, temperature: float) -> Evaluation | None:
        """The student's evaluation after `step` on so many prompts of the set `name`, if there is one already."""
        wanted = (step, name, prompts, samples, temperature)
        found = [
            one
            for one in self.books.evaluations
            if (one.step, one.set, one.prompts, one.samples_per_prompt, one.temperature) == wanted
        ]
        return found[-1] if found else None

    def reverse_kl(self) -> list[tuple[int, float]]:
        """(step, nats per token) of every step that has one, read from the file; raises `OSError`, `InputError`."""
        rows = read_jsonl(self.path) if self.path.exists() else ()
        return [(row["step"], row[KL_COLUMN]) for row in rows if row.get(KL_COLUMN) is not None]

    def report(self, restarts: dict[str, int], suspect: Sequence[Suspect] = ()) -> Report:
        """The report of what was measured so far."""
        intake, books = self.roles[self.plan.of_kind(RoleKind.INTAKE)[0].name], self.books
        sums, teachers = books.whole.of, bool(self.plan.of_kind(RoleKind.TEACHER))
        cached, computed = sums["teacher_cached_tokens"], sums["teacher_computed_tokens"]
        tokens, schedule, steps = sums["tokens"], self.plan.topology.schedule, books.whole.steps
        budget = schedule.tokens_per_step * steps if schedule.train_on is TrainOn.TOKENS else 0
        latency = {q: intake.now.get(f"score_latency_{q}") for q in ("p50_s", "p99_s")}
        counters = {name: int(sum(t.total(name) for t in self.roles.values())) for name in SHOWN_COUNTERS}
        sets = (*self.plan.topology.evaluation_sets, *books.teachers, *books.before)
        evaluated = {name: self._evaluated(name) for name in dict.fromkeys(sets)}
        return Report(
            name=self.plan.topology.name,
            steps=books.whole.steps,
            seconds=sums["seconds"],
            this_launch=self._this_launch() if books.began else None,
            **dict(evaluated.pop(HELD_OUT, Evaluated())),
            sets=evaluated,
            max_staleness=self.plan.topology.schedule.max_staleness,
            staleness=books.ages(),
            score_latency=ScoreLatency(**latency),
            weight_sync=WeightSync(
                blocked_s=sums["weight_sync_s"], engines_blocked_s=sums["engines_blocked_s"], updates=books.whole.steps
            ),
            prefix_hit_share=cached / (cached + computed) if cached + computed else None,
            teacher_recompute=computed / sums["teacher_tokens"] if sums["teacher_tokens"] else None,
            stages=books.whole.stages(teachers),
            trained_tokens=int(tokens),
            trained_samples=int(sums["completed"]),
            budget_share=tokens / budget if budget else None,
            budget_share_range=books.whole.sizes,
            cuts=int(sums["cuts"]),
            recompute_factor=sums["forwarded_tokens"] / tokens if tokens else None,
            skipped_prompts=self.skipped_prompts,
            counters={name: count for name, count in counters.items() if count},
            restarts=restarts,
            slow_engines=dict(self.slow_engines),
            suspect=list(suspect),
        )

    def _evaluated(self, name: str) -> Evaluated:
        """What was found on one set."""
        teachers = self.books.teachers.get(name, {})
        return Evaluated(
            teacher=teachers.get("teacher"),
            teachers={who: of for who, of in teachers.items() if who != "teacher"},
            student_before=self.books.before.get(name),
            student_after=self.student_after.get(name),
        )

    def _this_launch(self) -> Launch:
        sums = self.books.launch
        return Launch(
            first_step=sums.first,
            steps=sums.steps,
            seconds=sums.of["seconds"],
            stages=sums.stages(bool(self.plan.of_kind(RoleKind.TEACHER))),
            trained_tokens=int(sums.of["tokens"]),
            trained_samples=int(sums.of["completed"]),
        )
