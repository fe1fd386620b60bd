"""When a run evaluates, and what becomes of the figures: before, during and after training.

The generations of one evaluation are `evaluator.py`'s; which weights they see is the script's: it waits for the
evaluation under way before it sends new ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

from opd_async.config.evaluating import EvaluationSet
from opd_async.run.dispatcher import Dispatcher
from opd_async.run.evaluator import Evaluator
from opd_async.telemetry.progress import Progress
from opd_async.telemetry.report import Evaluation, on_set
from opd_async.transport import messages as m


class Evaluations:
    """The evaluations of one run, each on every set; at most one beside training. Without an evaluator none."""

    def __init__(self, dispatcher: Dispatcher, evaluator: Evaluator | None, progress: Progress) -> None:
        """`evaluator` is None where there are no held-out prompts."""
        self._dispatcher = dispatcher
        self._evaluator = evaluator
        self._progress = progress
        self._every = dispatcher.plan.topology.evaluation.every_steps
        self._sets: Mapping[str, EvaluationSet] = {} if evaluator is None else evaluator.sets
        self.under_way: asyncio.Task[dict[str, Evaluation]] | None = None
        """The one beside training."""

    @property
    def wanted(self) -> bool:
        """Whether the run has held-out prompts to evaluate on."""
        return self._evaluator is not None

    async def before(self, version: int) -> None:
        """Evaluate the untrained student, and each teacher where the topology asks for it, at once; none of them twice.

        On cancel, or if one of them fails: the others end too, and their figures are lost.
        """
        books = self._dispatcher.ledger.books
        for found in books.latest().values():  # of an earlier launch
            self._export(found)
        plan = self._dispatcher.plan
        others = () if plan.topology.opd.of_itself else plan.teacher_urls  # behind these prompts it is the student
        teachers = {name: sets for name in others if (sets := self._sets_of(name))}
        student = [name for name in self._sets if version == 0 and name not in books.before]
        whom = {0: [], 1: ["the teacher"]}.get(len(teachers), ["the teachers"]) + ["the student"] * bool(student)
        if not whom:
            return
        self._progress.say(f"evaluating {' and '.join(whom)} before training")
        async with asyncio.TaskGroup() as group:
            group.create_task(self.student(version, student))
            for name, sets in teachers.items():
                wanted = {one: self._sets[one].prompts for one in sets}
                group.create_task(self._evaluate(m.LeaseKind.EVAL_TEACHER, wanted, 0, name))

    def _sets_of(self, teacher: str) -> list[str]:
        """The sets on which a teacher is still to be evaluated: it is no distance from itself."""
        assert self._evaluator is not None
        before = self._dispatcher.ledger.books.teachers
        return [
            name
            for name, one in self._sets.items()
            if one.teacher and one.judge != "teacher"
            if self._who(teacher) not in before.get(name, {})
            if self._evaluator.prompts_of(name, one.prompts, teacher)
        ]

    async def after(self, version: int) -> dict[str, Evaluation]:
        """Evaluate the trained student on each set that an earlier launch has not. On cancel: some rows are written."""
        assert self._evaluator is not None
        ledger, found = self._dispatcher.ledger, {}
        for name, one in self._sets.items():
            count = self._evaluator.count(name, one.prompts)
            before = ledger.evaluated(version, name, count, one.samples_per_prompt, one.temperature)
            if before is not None:
                found[name] = before
        if missing := [name for name in self._sets if name not in found]:
            self._progress.say("evaluating the student after training")
            found |= await self.student(version, missing)
        return {name: found[name] for name in self._sets}

    async def student(self, step: int, sets: Sequence[str]) -> dict[str, Evaluation]:
        """Evaluate the student on all the prompts of these sets. On cancel: some rows are written."""
        wanted = {name: self._sets[name].prompts for name in sets}
        return await self._evaluate(m.LeaseKind.EVAL_STUDENT, wanted, step)

    def _who(self, teacher: str) -> str:
        """What a teacher is called in the figures."""
        return f"teacher {teacher}" if len(self._dispatcher.plan.teacher_urls) > 1 else "teacher"

    async def _evaluate(
        self, kind: m.LeaseKind, wanted: Mapping[str, int], step: int, teacher: str | None = None
    ) -> dict[str, Evaluation]:
        """Evaluate a model on so many prompts of each set, all sets at once."""
        assert self._evaluator is not None
        slots = self._evaluator.slots()
        async with asyncio.TaskGroup() as group:
            tasks = {
                name: group.create_task(self._on(kind, name, count, step, slots, teacher))
                for name, count in wanted.items()
            }
        return {name: task.result() for name, task in tasks.items()}

    async def _on(
        self, kind: m.LeaseKind, name: str, count: int, step: int, slots: asyncio.Semaphore, teacher: str | None
    ) -> Evaluation:
        """Evaluate on one set, and file what was found."""
        assert self._evaluator is not None
        deadline_s = self._dispatcher.plan.topology.supervisor.evaluation_deadline_s
        who = "student" if teacher is None else self._who(teacher)
        with self._dispatcher.trace.during("evaluations", f"{on_set(who, name)} at step {step}"):
            evaluation = await self._evaluator.evaluate(kind, name, count, step, deadline_s, slots, teacher)
        self._dispatcher.ledger.evaluation(evaluation, who)
        if teacher is None:
            self._export(evaluation)
        self._progress.evaluation(who, evaluation)
        return evaluation

    def _export(self, found: Evaluation) -> None:
        """Give the figures of the student's last evaluation to Prometheus."""
        metrics = self._dispatcher.metrics
        figures = {"step": found.step, "score": found.pass_at_1}
        figures |= {"reverse_kl": found.reverse_kl, "forward_kl": found.forward_kl}
        for name, value in figures.items():
            if value is not None:
                metrics[f"opd_launcher_evaluation_{name}"].labels(found.set).set(value)

    def begin(self, step: int) -> None:
        """Start an evaluation beside training, if one is due after `step`; the next weight update waits for it."""
        if self._every is not None and step % self._every == 0:
            self._begin(step, self._sets)

    def make_up(self, step: int) -> None:
        """Start what was due at `step` or before and never ended, on some sets or all: a stop or a crash came first."""
        due = 0 if self._every is None else step - step % self._every
        if due > 0:
            found = self._dispatcher.ledger.books.evaluations
            done = {one.set for one in found if due <= one.step <= step}
            self._begin(step, [name for name in self._sets if name not in done])

    def _begin(self, step: int, sets: Collection[str]) -> None:
        if not sets:
            return
        wanted = {name: self._sets[name].during_prompts for name in sets}
        work = self._evaluate(m.LeaseKind.EVAL_STUDENT, wanted, step)
        self._dispatcher.evaluated.clear()
        self.under_way = self._dispatcher.spawn(work, f"evaluation-{step}")
        self.under_way.add_done_callback(lambda _: self._dispatcher.evaluated.set())

    def abandon(self) -> None:
        """Cancel the evaluation under way: its samples are being forgotten."""
        if self.under_way is not None:
            self.under_way.cancel()
            self.under_way = None
