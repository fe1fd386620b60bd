"""When a run evaluates, and what becomes of the figures: before, during and after training.

The generations of one evaluation are `evaluator.py`'s; which weights they see is the script's: it waits for the
evaluation under way before it sends new ones.
"""

from __future__ import annotations

import asyncio

from opd_async.run.dispatcher import Dispatcher
from opd_async.run.evaluator import Evaluator
from opd_async.telemetry.progress import Progress
from opd_async.telemetry.report import Evaluation
from opd_async.transport import messages as m


class Evaluations:
    """The evaluations of one run; at most one beside training. Without an evaluator (no held-out prompts) none."""

    def __init__(self, dispatcher: Dispatcher, evaluator: Evaluator | None, progress: Progress) -> None:
        self._dispatcher = dispatcher
        self._evaluator = evaluator
        self._progress = progress
        self._section = dispatcher.plan.topology.evaluation
        self.under_way: asyncio.Task[Evaluation] | None = None
        """The one beside training."""

    @property
    def wanted(self) -> bool:
        """Whether the run has held-out prompts to evaluate on."""
        return self._evaluator is not None

    async def before(self, version: int) -> None:
        """Evaluate the untrained student, and each teacher where the topology asks for it, at once; none of them twice.

        On cancel, or if one of them fails: the others end too, and their figures are lost.
        """
        assert self._evaluator is not None
        count, ledger = self._section.prompts, self._dispatcher.ledger
        for found in ledger.books.evaluations[-1:]:  # of an earlier launch
            self._export(found)
        names = [name for name in self._dispatcher.plan.teacher_urls if self._evaluator.prompts_of(name, count)]
        asked = self._section.teacher and self._section.judge != "teacher"  # it is no distance from itself
        teachers = [name for name in names if asked and self._who(name) not in ledger.books.teachers]
        student = version == 0 and ledger.books.student_before is None
        whom = {0: [], 1: ["the teacher"]}.get(len(teachers), ["the teachers"]) + ["the student"] * student
        if not whom:
            return
        self._progress.say(f"evaluating {' and '.join(whom)} before training")
        async with asyncio.TaskGroup() as group:
            if student:
                group.create_task(self.student(version))
            for name in teachers:
                group.create_task(self._evaluate(m.LeaseKind.EVAL_TEACHER, count, 0, name))

    async def after(self, version: int) -> Evaluation:
        """Evaluate the trained student, unless an earlier launch has. On cancel: nothing is written."""
        assert self._evaluator is not None
        section, count = self._section, self._evaluator.count(self._section.prompts)
        found = self._dispatcher.ledger.evaluated(version, count, section.samples_per_prompt, section.temperature)
        if found is not None:
            return found
        self._progress.say("evaluating the student after training")
        return await self.student(version)

    async def student(self, step: int) -> Evaluation:
        """Evaluate the student on all the prompts of an evaluation. On cancel: nothing is written."""
        return await self._evaluate(m.LeaseKind.EVAL_STUDENT, self._section.prompts, step)

    def _who(self, teacher: str) -> str:
        """What a teacher is called in the figures."""
        return f"teacher {teacher}" if len(self._dispatcher.plan.teacher_urls) > 1 else "teacher"

    async def _evaluate(self, kind: m.LeaseKind, count: int, step: int, teacher: str | None = None) -> Evaluation:
        assert self._evaluator is not None
        deadline_s = self._dispatcher.plan.topology.supervisor.evaluation_deadline_s
        who = "student" if teacher is None else self._who(teacher)
        with self._dispatcher.trace.during("evaluations", f"{who} at step {step}"):
            evaluation = await self._evaluator.evaluate(kind, count, step, deadline_s, teacher)
        self._dispatcher.ledger.evaluation(evaluation, who)
        if teacher is None:
            self._export(evaluation)
        self._progress.evaluation(who, evaluation)
        return evaluation

    def _export(self, found: Evaluation) -> None:
        """Give the figures of the student's last evaluation to Prometheus."""
        metrics = self._dispatcher.metrics
        figures = {"step": found.step, "score": found.pass_at_1, "reverse_kl": found.reverse_kl}
        for name, value in figures.items():
            if value is not None:
                metrics[f"opd_launcher_evaluation_{name}"].labels("held_out").set(value)

    def begin(self, step: int) -> None:
        """Start an evaluation beside training, if one is due after `step`; the next weight update waits for it."""
        every = self._section.every_steps
        if every is not None and step % every == 0:
            self._begin(step)

    def make_up(self, step: int) -> None:
        """Start the evaluation that was due at `step` or before and never ended: a stop or a crash came first."""
        every = self._section.every_steps
        due = 0 if every is None else step - step % every
        if due > 0 and not any(due <= one.step <= step for one in self._dispatcher.ledger.books.evaluations):
            self._begin(step)

    def _begin(self, step: int) -> None:
        if self._evaluator is None:
            return
        work = self._evaluate(m.LeaseKind.EVAL_STUDENT, self._section.during_prompts, step)
        self._dispatcher.evaluated.clear()
        self.under_way = self._dispatcher.spawn(work, f"evaluation-{step}")
        self.under_way.add_done_callback(lambda _: self._dispatcher.evaluated.set())

    def abandon(self) -> None:
        """Cancel the evaluation under way: its samples are being forgotten."""
        if self.under_way is not None:
            self.under_way.cancel()
            self.under_way = None
