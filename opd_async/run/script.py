"""The script of a run, one coroutine: start, prove the weights, evaluate, train, evaluate, export.

    establish -> [evaluate] -> (step -> weight update -> checkpoint? -> export?)* -> checkpoint -> [evaluate] -> export

When the learner or the intake dies, `opd_async.run.lifecycle` runs it again from `establish`. A student engine that was
restarted asks for the weights (`RESYNC`) at any time; `_serving` answers such requests while something else is awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from opd_async.data.own_prompts import ENDLESS
from opd_async.errors import RoleError
from opd_async.plan.plan import RoleKind
from opd_async.run.arrivals import INTAKE, Arrivals
from opd_async.run.consulting import Consulting
from opd_async.run.dispatcher import Dispatcher
from opd_async.run.evaluations import Evaluations
from opd_async.run.evaluator import Evaluator
from opd_async.run.learner_commands import LearnerCommands
from opd_async.run.saving import Saving
from opd_async.run.state import RESYNC, UPDATE
from opd_async.scheduling.leases import LeaseBook, PromptOrder, admission_of
from opd_async.telemetry.progress import Progress
from opd_async.transport import messages as m
from opd_async.transport.owed import Owed

T = TypeVar("T")

SYNC_TRIES = 5
RESET_DEADLINE_S = 60.0


class Script:
    """Leads one run, or what is left of it after a checkpoint."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        evaluator: Evaluator | None,
        prompts: int,
        progress: Progress,
        attempt_floor: int = 0,
    ) -> None:
        self._dispatcher = dispatcher
        self._state = dispatcher.state
        self._evaluations = Evaluations(dispatcher, evaluator, progress)
        self._prompts = prompts
        self._progress = progress
        self._attempt_floor = attempt_floor
        self._topology = dispatcher.plan.topology
        self._steps = dispatcher.plan.topology.schedule.steps
        self._deadlines = dispatcher.plan.topology.supervisor
        self._owed: Owed | None = None
        self._learner = LearnerCommands(dispatcher, self._deadlines.step_deadline_s)
        if evaluator is not None and self._topology.opd.in_learner:
            evaluator.consult = Consulting(self._learner, dispatcher.plan.vocab_size).complete
        self.saving = Saving(dispatcher, self._learner, progress)
        self._arrivals = Arrivals(dispatcher, progress.say)
        self._accounted = -1
        self._began = -1
        self._unaccounted: m.LearnerReply | None = None
        self._resyncing = False
        """Weights are being sent beside an evaluation."""
        self._reached: list[str] = []

    async def run(self) -> None:
        """From the newest checkpoint, or the beginning, to the last step; raises what went wrong.

        On cancel: the step under way stays with the learner; `wind_down` accounts for it and saves it.
        """
        ledger = self._dispatcher.ledger
        version = await self.establish()
        if self._evaluations.wanted:
            await self._serving(self._evaluations.before(version))
        ledger.start_training()
        await self._send_version(version)
        if version < self._steps:
            self._evaluations.make_up(version)
        self._dispatcher.leasing.admit(True)
        await self.train(version)
        await self._finish()

    async def _finish(self) -> None:
        dispatcher = self._dispatcher
        dispatcher.leasing.admit(False)
        await self._settle_evaluation()
        unsaved = await self.saving.attempt(self.saving.checkpoint(self._state.version))
        await self.forget_samples()
        await dispatcher.barrier.open(self._state.version)
        if self._evaluations.wanted:
            dispatcher.ledger.student_after = await self._serving(self._evaluations.after(self._state.version))
        await self.saving.export_last()
        if unsaved is not None:
            raise unsaved

    async def establish(self) -> int:
        """Wait for every role, take over the frontier, and prove that every engine holds the student's weights.

        Returns the weight version. On cancel: run it again from the start; what was proven counts no more.
        """
        dispatcher, topology = self._dispatcher, self._topology
        self._state.version = -1
        there = await self._arrivals.everybody()
        dispatcher.watch.engines_answered(but=(*dispatcher.deaths.starting, *dispatcher.fleet.away))
        frontier = there[INTAKE]
        self._accounted = self._began = frontier.version
        shuffle = topology.data.shuffle and self._prompts < ENDLESS  # an iterator has its own order
        order = PromptOrder(self._prompts, topology.rollout.group_size, topology.seed, shuffle)
        self._state.book = LeaseBook(
            frontier,
            order,
            admission_of(topology.schedule),
            dispatcher.slots,
            attempt=self._attempt_floor,
            longest=topology.rollout.sampling.max_response_tokens,
        )
        version = await self._update_weights(verify=True)
        if version != frontier.version:
            folder = dispatcher.plan.run_folder / "checkpoints"
            raise RoleError(
                f"the learner resumed at step {version}, the frontier at {frontier.version}: the checkpoint in "
                f"{folder} mixes two steps; remove it to resume from the one before"
            )
        self._progress.say(f"weights {version} are in every student engine, proven by version and content")
        return version

    # --- training ----------------------------------------------------------------------------------------------------

    async def train(self, version: int) -> None:
        """Train steps from `version` on until the topology's number is reached.

        On cancel: the step under way stays with the learner; `wind_down` accounts for it.
        """
        while version < self._steps:
            reply = await self._trained_step("an optimizer step")
            if reply is None:
                await self._update_weights(verify=True)
                continue
            version = reply.version
            await self._finish_step(reply)

    async def _trained_step(self, who: str) -> m.LearnerReply | None:
        """The learner's next step, which is owed a row from now on; None when an engine asks for the weights."""
        event = await self._dispatcher.mailbox.expect(UPDATE, self._deadlines.step_deadline_s, who, at_work=True)
        if event == RESYNC:
            return None
        assert isinstance(event, m.LearnerReply)
        if event.error is not None:
            raise RoleError(f"the learner failed in step {event.version + 1}: {event.error}")
        self._unaccounted = event
        return event

    async def _finish_step(self, reply: m.LearnerReply) -> None:
        """A step is trained: weights to the engines, figures to the ledger, and on to the next."""
        dispatcher, step = self._dispatcher, reply.version
        loop = asyncio.get_running_loop()
        await self._settle_evaluation()
        began, blocked = loop.time(), dispatcher.barrier.blocked_s
        if step > self._state.version:
            await self._update_weights(verify=False)
        await self._account(reply, loop.time() - began, dispatcher.barrier.blocked_s - blocked)
        if step < self._steps:
            await self.saving.due(step)
            await self._send_version(step)
            self._evaluations.begin(step)

    async def _account(self, reply: m.LearnerReply, sync_s: float, engines_s: float) -> None:
        """The row, the counters and the line of a trained step."""
        dispatcher, step = self._dispatcher, reply.version
        who = "the intake's account of the step"
        started = await dispatcher.mailbox.expect(("StepStarted", step - 1), self._deadlines.start_deadline_s, who)
        row = dispatcher.ledger.step(started, reply.stats, sync_s, engines_s)
        dispatcher.metrics["opd_launcher_tokens_per_device_second"].set(row.get("tokens_per_device_s"))
        dispatcher.metrics["opd_launcher_planned_share"].set(row.get("planned_share"))
        dispatcher.metrics["opd_launcher_step"].set(step)
        dispatcher.metrics["opd_launcher_trained_tokens_total"].inc(started.stats["tokens"])
        if self._state.book is not None:
            tokens, waited = int(started.stats["tokens"]), started.waited_s
            self._state.book.admission.closed(tokens, waited / max(waited + reply.stats.get("seconds", 0.0), 1e-9))
            dispatcher.leasing.look_again()
        shown = {name: row[name] for name in ("planned_share",) if name in row}
        self._progress.step(step, reply.stats | shown, started)
        self._accounted, self._unaccounted = step, None

    async def _send_version(self, version: int) -> None:
        """Let the intake choose the step at `version`, with the tokens of older weights that exist."""
        owed = self._owed
        assert owed is not None
        await self._dispatcher.to_intake(m.Version(version, owed.sample_ids, owed.attempts, owed.ends))

    async def _update_weights(self, verify: bool) -> int:
        """Stop generation, send the learner's weights to every student engine, go on; returns their version."""
        dispatcher, before = self._dispatcher, self._state.version
        owed = await dispatcher.barrier.close()
        await dispatcher.before_update()
        if dispatcher.plan.topology.opd.on_student_engines:
            await dispatcher.barrier.stop_scores()
        for tries in range(1, SYNC_TRIES + 1):
            engines = self._engines_to_reach()
            group = f"opd-{self._state.engine_group}"
            command = m.SyncWeights(group, engines, verify or tries > 1)
            reply = await self._learner.ask(command)
            if reply.error is None:
                break
            self._progress.say(f"weights were not sent ({reply.error}); trying again")
            self._state.engine_group += 1
            await asyncio.sleep(self._deadlines.backoff_s)
            await dispatcher.watch.end_stuck_engines(self._engines_to_reach())
            await self._arrivals.students(self._engines_to_reach())
        else:
            raise RoleError(f"the weights could not be sent in {SYNC_TRIES} tries, last: {reply.error}")
        if reply.version != before:
            self._owed = owed
        self._state.version = reply.version
        dispatcher.metrics["opd_launcher_weight_version"].set(reply.version)
        dispatcher.metrics["opd_launcher_step"].set(max(self._accounted, 0))
        await dispatcher.barrier.open(reply.version, new=reply.version != before)
        dispatcher.on_updated(engines)
        dispatcher.leasing.look_again()
        return int(reply.version)

    def _engines_to_reach(self) -> list[str]:
        """The student engines that get the weights: not those of lost hosts. Others than before are another group."""
        engines = self._dispatcher.fleet.students_to_reach()
        if engines != self._reached:
            self._state.engine_group += bool(self._reached)
            self._reached = engines
        return engines

    async def forget_samples(self) -> None:
        """Have every actor drop what it holds; generation stays stopped. On cancel: some actors have."""
        dispatcher = self._dispatcher
        await dispatcher.barrier.close()
        request = dispatcher.new_request()
        kinds = (RoleKind.ROLLOUT, RoleKind.TEACHER)
        self._state.resetting = {name: request for kind in kinds for name in dispatcher.up(kind)}
        told = [name for kind in kinds for name in await dispatcher.broadcast(kind, m.Reset(request))]
        for name in told:
            await dispatcher.answer(
                ("ResetDone", name, request), RESET_DEADLINE_S, f"{name} to forget its samples", name
            )
        self._state.resetting.clear()
        dispatcher.barrier.reset()

    async def wind_down(self) -> None:
        """Finish the step that was taken and save a checkpoint, so that nothing trained is lost; after a signal.

        On cancel (a second signal): the run ends with the checkpoint before.
        """
        dispatcher = self._dispatcher
        dispatcher.leasing.admit(False)
        self.abandon_evaluation()
        await dispatcher.to_intake(m.Quiesce("the run is being stopped"))
        quiesced = await dispatcher.mailbox.expect(
            "Quiesced", self._deadlines.stop_deadline_s, "the intake to come to rest"
        )
        while self._accounted < quiesced.version:
            reply = self._unaccounted or await self._trained_step("the last optimizer step")
            if reply is not None:
                await self._account(reply, sync_s=0.0, engines_s=0.0)
        if quiesced.version == self._began:  # nothing was trained since the start, so there is nothing new to save
            return
        await self.saving.checkpoint(quiesced.version)
        self._progress.say(f"saved a checkpoint after step {quiesced.version}")

    # --- beside training ---------------------------------------------------------------------------------------------

    def abandon_evaluation(self) -> None:
        """Give up the evaluation under way: its samples are being forgotten."""
        self._evaluations.abandon()

    async def _settle_evaluation(self) -> None:
        """Wait for the evaluation under way, so that it sees one set of weights."""
        task = self._evaluations.under_way
        if task is not None:
            await self._serving(_result(task))
            self._evaluations.under_way = None

    async def _serving(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`; meanwhile send the weights to engines that were restarted."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work)
            requests = group.create_task(self._serve_resyncs(task))
            # weights that are under way are sent to their end: nobody else would have generation go on
            task.add_done_callback(lambda _: None if self._resyncing else requests.cancel())
        return task.result()

    async def _serve_resyncs(self, work: asyncio.Task[Any]) -> None:
        while not work.done():
            event = await self._dispatcher.mailbox.expect(
                UPDATE, 2 * self._deadlines.evaluation_deadline_s, "the evaluation"
            )
            # the intake may choose the next step only after `Version`, which nobody sends before this ends: so no
            # trained step can be under way, and none is lost here
            assert event == RESYNC, f"a step was trained during an evaluation: {event}"
            self._resyncing = True
            try:
                await self._update_weights(verify=True)
            finally:
                self._resyncing = False


async def _result(task: asyncio.Task[T]) -> T:
    return await task
