"""One launch from start to report: processes up, the script of the run, recovery, and the way down.

    launch.py        command line -> topology -> inputs -> plan; prints the report
    Lifecycle        one launch: starts everything, runs the script again after a recovery, stops everything
      Supervisor     processes by name: start, watch, stop; knows nothing of roles
      Fleet          plan, restart budget and stop order; knows nothing of messages
      Dispatcher     the control socket: who is up, leases, deaths
      Script         one coroutine: establish, step, update, checkpoint, evaluate

what happens                      what follows
the script ends                   report, stop in order, exit 0
learner or intake dies            both start again from the last checkpoint; everything generated since is dropped
a host of the learner stays away  the same with fewer ranks on the hosts that are left (`learner_hosts.py`), or the end
another role dies                 the dispatcher restarts it; the script goes on
a role dies beyond its budget     the run ends with its last lines
a disk takes no checkpoint        what else can be saved is (`saving.py`), report, stop in order, exit 1
SIGINT, SIGTERM or SIGHUP         the step under way is finished and saved, then stop in order; a second one kills
the same while nothing is trained every process is killed
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import zmq.asyncio

from opd_async.cluster.fleet import Fleet
from opd_async.cluster.hosting import Supervise, alone
from opd_async.cluster.hosts import Hosts
from opd_async.cluster.nodes import HostLostError
from opd_async.data.completions import Mix
from opd_async.errors import StorageError
from opd_async.files import storing
from opd_async.keys import RunKeys
from opd_async.plan.plan import Plan, RoleKind, counters_file
from opd_async.process import leaves
from opd_async.role import ATTEMPT_FLOOR_ENV
from opd_async.run import checkpoints
from opd_async.run.dispatcher import Dispatcher
from opd_async.run.elastic import Elastic
from opd_async.run.evaluator import Evaluator
from opd_async.run.inputs import Inputs
from opd_async.run.learner_hosts import LearnerHosts
from opd_async.run.ledger import Ledger
from opd_async.run.scraping import scrape_labels, scrape_targets
from opd_async.run.script import Script
from opd_async.run.trained import TrainedRecord
from opd_async.run.uploads import Uploads, uploading
from opd_async.signals import Signals
from opd_async.telemetry.exporter import RoleMetrics, loop_lag, write_targets
from opd_async.telemetry.features import features_of
from opd_async.telemetry.host import HostCollector
from opd_async.telemetry.length_drift import LengthDrift
from opd_async.telemetry.progress import Progress
from opd_async.telemetry.report import Report
from opd_async.telemetry.samples import SAMPLES_FILE, SampleRecord
from opd_async.telemetry.trace import Trace
from opd_async.telemetry.trackers import LOST, Trackers
from opd_async.telemetry.tracking import Tracker
from opd_async.transport import messages as m

GRACE_POLL_S = 0.05
ENGINES = (RoleKind.STUDENT_ENGINE, RoleKind.TEACHER_ENGINE)
ATTEMPTS_PER_RECOVERY = 1000
"""Attempts are numbered from a new thousand after each recovery, so that old chunks are known for what they are."""


class Lifecycle:
    """Owns one launch. On cancel of `run`: every process is stopped, as after an error."""

    def __init__(
        self,
        plan: Plan,
        inputs: Inputs,
        echo: Callable[[str], None],
        signals: Signals,
        checkpoint: checkpoints.Newest = checkpoints.NONE,
        supervise: Supervise = alone,
    ) -> None:
        """`checkpoint` is the one to go on from, verified (`run_folder.prepare` has found it). `supervise` makes what
        starts the processes, on this host or on several (`opd_async.cluster.hosting`)."""
        self._supervise = supervise
        self._keys = RunKeys.draw()
        self._plan = plan = plan.with_keys(self._keys)
        self._inputs = inputs
        informed = plan.topology.opd.use_opd and plan.topology.data.informs_teachers
        self._progress = Progress(echo, plan.topology.schedule.steps, LengthDrift() if informed else None)
        self._echo = echo
        self._signals = signals
        self._recoveries = 0
        self._over = False
        self._dispatcher: Dispatcher | None = None
        self._learner_hosts: LearnerHosts | None = None
        """None on one host."""
        self._checkpoint = checkpoint
        self.ledger: Ledger | None = None
        self.unsaved: StorageError | None = None
        """The run ended because no disk took what it has to keep."""
        self._samples: SampleRecord | None = None
        self._trackers: Trackers | None = None
        self._uploads: Uploads | None = None
        self._on_the_way_back = False
        """A signal ended a recovery: the records speak of steps that were lost."""
        signals.on_first = self._acknowledge

    @property
    def interrupted(self) -> bool:
        """A signal has asked for the end."""
        return self._signals.first.is_set()

    def _acknowledge(self) -> None:
        """A word for who has sent the signal: what happens now."""
        if self._over:
            self._progress.say("stopping: the run is over, its processes are ending")
        elif self._training:
            self._progress.say("stopping: finishing the step under way (a second signal stops at once)")
        else:
            self._progress.say("stopping: nothing is being trained, so every process ends now")

    @property
    def _training(self) -> bool:
        """Is there anything that an orderly end could save?"""
        return self._dispatcher is not None and self._dispatcher.state.version >= 0

    async def run(self) -> Report:
        """The whole run, or what a signal left of it. Raises `OpdError`, alone or in groups, for what ends it early.

        No process survives it.
        """
        plan = self._plan
        self._set_aside()
        metrics = self._metrics()
        self._write_targets()
        self.ledger = ledger = Ledger(plan=plan, skipped_prompts=self._inputs.prompts.skipped_too_long)
        ledger.rewind(self._checkpoint.step, self._checkpoint.folder)
        ledger.on_unwritten = lambda kind, count: metrics["opd_launcher_unwritten_total"].labels(kind).inc(count)
        count = metrics[LOST].labels
        trackers = Trackers(plan.topology, plan.run_folder, self._echo, lambda kind: count(kind).inc())
        function = plan.topology.tracking.function
        with Tracker(function, self._echo) as tracker, trackers, Trace.of(plan, "launcher") as trace:
            self._tell(tracker, trackers, trace)
            report = await self._run(ledger, metrics, trace)
            await self._close(trackers, report)
            return report

    def _tell(self, tracker: Tracker, trackers: Trackers, trace: Trace) -> None:
        """Have every row and event go to the user's function, and to trackers; events to the timeline too."""
        assert self.ledger is not None

        def row(kind: str, values: dict[str, Any]) -> None:
            tracker.track(kind, values)
            trackers.track(kind, values)

        self.ledger.on_row, self._trackers = row, trackers
        self._progress.on_event = partial(_on_event, tracker, trace)
        trackers.track("rewind", self._checkpoint.step)

    async def _close(self, trackers: Trackers, report: Report) -> None:
        """Give the trackers time to send what they have; a signal cuts it short, the second one after an interrupt."""
        if not self.interrupted:
            trackers.track("report", report.model_dump(mode="json"))
        closing = asyncio.create_task(asyncio.to_thread(trackers.close), name="close-trackers")
        await self._unless_hurried(closing)
        if not closing.done():
            trackers.kill()
        await closing

    async def _unless_hurried(self, work: Awaitable[None]) -> None:
        """Wait for the end of `work`, or for a signal, the second one after an interrupt."""
        hurry = self._signals.second if self.interrupted else self._signals.first
        task, impatient = asyncio.ensure_future(work), asyncio.create_task(_wait(hurry), name="impatient")
        await asyncio.wait([task, impatient], return_when=asyncio.FIRST_COMPLETED)
        impatient.cancel()

    async def _run(self, ledger: Ledger, metrics: RoleMetrics, trace: Trace) -> Report:
        """The run inside of its trackers."""
        plan = self._plan
        telemetry = plan.topology.telemetry
        self._samples = samples = SampleRecord(
            plan.run_folder / SAMPLES_FILE, self._inputs.tokenizer, telemetry.samples_mib << 20, self._progress.say
        )
        if (trackers := self._trackers) is not None:
            samples.on_row = lambda row: trackers.track("sample", row)
        with (
            samples,
            zmq.asyncio.Context() as context,
            contextlib.closing(ledger),
            metrics.serve(plan.launcher_host, plan.launcher_metrics_port),
        ):
            async with uploading(plan, self._progress.say, metrics) as self._uploads:
                report = await self._with_processes(ledger, metrics, trace, context)
                if self._uploads is not None:
                    await self._unless_hurried(self._uploads.finish())
            self._write_targets(over=True)
            return report

    async def _with_processes(
        self, ledger: Ledger, metrics: RoleMetrics, trace: Trace, context: zmq.asyncio.Context
    ) -> Report:
        """The part of the run during which its processes live."""
        plan, stop_deadline_s = self._plan, self._plan.topology.supervisor.stop_deadline_s
        async with self._supervise(self._echo, stop_deadline_s, ledger.unwritten_lines) as supervisor:
            fleet = Fleet(plan, supervisor, self._progress.say, self._keys)
            self._progress.missing = lambda: [
                role.name
                for role in self._plan.roles
                if role.name not in supervisor.running and role.name not in fleet.away
            ]
            prompts, topology = self._inputs.prompts.prompts, plan.topology
            given = self._inputs.completions.completions
            mix = Mix(given, topology.opd.gkd_lambda, topology.seed, topology.data.shuffle)
            self._dispatcher = dispatcher = Dispatcher(
                plan=plan,
                fleet=fleet,
                ledger=ledger,
                metrics=metrics,
                context=context,
                prompts=prompts,
                mix=mix,
                trace=trace,
            )
            assert self._samples is not None
            dispatcher.on_sample = self._samples.add
            self._samples.rewind(self._checkpoint.step)
            elastic = None
            if isinstance(supervisor, Hosts):
                elastic = Elastic(dispatcher, supervisor, self._grow)
                node_back_s = topology.cluster.node_back_s
                self._learner_hosts = LearnerHosts(dispatcher, supervisor, node_back_s, self._grow)
            try:
                await self._conduct(dispatcher, fleet, elastic)
            finally:
                dispatcher.close()
                fleet.forget_keys()
        return ledger.report(fleet.restarts, dispatcher.suspects.summary())

    def _metrics(self) -> RoleMetrics:
        """The launcher's own, with a series for each process of the plan that may be counted by name."""
        plan = self._plan
        metrics = RoleMetrics("launcher", features_of(plan.topology), counters_file(plan.run_folder, "launcher"))
        HostCollector(metrics.registry)  # no agent is on the launcher's host
        metrics["opd_launcher_steps_wanted"].set(plan.topology.schedule.steps)
        metrics["opd_launcher_learner_ranks"].set(plan.topology.learner.ranks)
        started, engines = {role.name for role in plan.roles}, set(plan.engine_names.values())
        metrics.begin("opd_launcher_restarts_total", started)
        metrics.begin("opd_launcher_hangs_total", started | engines)
        metrics.begin(LOST, plan.topology.tracking.trackers)
        for name in ("opd_launcher_slow_engines_total", "opd_launcher_foreign_weights_total"):
            metrics.begin(name, engines)
        return metrics

    def checkpointed_version(self) -> int:
        """Step of the newest complete checkpoint; 0 where there is none."""
        folder = checkpoints.chosen(self._plan.run_folder / "checkpoints", {})
        return checkpoints.verify(folder, thorough=False) if folder is not None else 0

    def _set_aside(self) -> None:
        """Name the checkpoints that are damaged, and put them out of the way."""
        found = self._checkpoint
        for folder, problem in found.damaged:
            with storing(folder):
                aside = checkpoints.set_aside(folder)
            self._echo(
                f"warning: {problem.partition('; remove')[0]}; kept as {aside.name}, going back to step {found.step}"
            )

    def _write_targets(self, over: bool = False) -> None:
        """Say where metrics are; nowhere once the run is over, so that nobody misses its processes."""
        targets = {} if over else scrape_targets(self._plan)
        labels = scrape_labels(self._plan)
        name = self._plan.topology.name
        try:
            write_targets(self._plan.run_folder / "targets.json", targets, labels, name)
        except OSError as error:  # for Prometheus: the run itself does not need it
            self._progress.say(f"targets.json cannot be written: {error}")

    def _grow(self, plan: Plan) -> None:
        """Take over a plan that has more roles, or another learner: they are stopped in order, and scraped."""
        self._plan = plan
        self._write_targets()

    async def _conduct(self, dispatcher: Dispatcher, fleet: Fleet, elastic: Elastic | None) -> None:
        async with asyncio.TaskGroup() as group:
            dispatcher.start_loops(group)
            dispatcher.spawn(loop_lag(dispatcher.metrics["opd_launcher_loop_lag_seconds"]), "loop-lag")
            try:
                self._progress.say(f"starting {len(self._plan.roles)} processes; logs in {fleet.log_folder()}")
                await fleet.start_all(self._checkpoint.environment)
                if elastic is not None:
                    elastic.begin()
                await self._lead(dispatcher, fleet)
            finally:
                if elastic is not None:
                    elastic.end()
                dispatcher.stop_loops()
                await self._stop(dispatcher, fleet)
                if self._on_the_way_back:
                    self._leave_at_checkpoint(dispatcher)

    async def _lead(self, dispatcher: Dispatcher, fleet: Fleet) -> None:
        """Run the script; again after each loss of the learner."""
        evaluator = self._evaluator(dispatcher)
        while True:
            floor = self._recoveries * ATTEMPTS_PER_RECOVERY
            script = Script(dispatcher, evaluator, len(self._inputs.prompts.prompts), self._progress, floor)
            if self._uploads is not None:
                script.saving.on_saved, script.saving.in_use = self._uploads.offer, self._uploads.under_way
            try:
                ended = await _race(dispatcher, script.run(), signal=self._signals.first, lost=dispatcher.learner_lost)
                if ended == "signal" and self._training:
                    second = self._signals.second
                    await _race(dispatcher, script.wind_down(), signal=second, lost=dispatcher.learner_lost)
            except ExceptionGroup as group:
                if (unsaved := _storage(group)) is None:
                    raise
                self.unsaved, ended = unsaved, "done"
            if ended in ("done", "signal"):
                self._over = True
                return
            # on several hosts this may wait for one to come back
            recovery = self._recover(dispatcher, fleet, script)
            if await _race(dispatcher, recovery, signal=self._signals.first) == "signal":
                self._over = self._on_the_way_back = True
                return

    def _evaluator(self, dispatcher: Dispatcher) -> Evaluator | None:
        topology, sets = self._plan.topology, self._plan.topology.evaluation_sets
        if not sets:
            return None
        prompts = {name: self._inputs.held_out[name].prompts for name in sets}
        slots = topology.rollout.slots
        evaluator = Evaluator(sets, prompts, self._inputs.tokenizer, slots, dispatcher)
        dispatcher.on_eval_done, dispatcher.on_gone = evaluator.deliver, evaluator.lost
        assert self._samples is not None
        evaluator.shown, evaluator.on_sample = topology.telemetry.samples_per_step, self._samples.add
        return evaluator

    async def _recover(self, dispatcher: Dispatcher, fleet: Fleet, script: Script) -> None:
        """The learner or the intake is gone: both go back to the last checkpoint, and so do all samples."""
        assert dispatcher.state.lost is not None
        self._recoveries += 1
        await fleet.await_restart(dispatcher.state.lost)
        await self._take_down(dispatcher, fleet)
        script.abandon_evaluation()
        await script.forget_samples()
        self._checkpoint = await asyncio.to_thread(checkpoints.newest, self._plan.run_folder / "checkpoints")
        self._set_aside()
        await self._bring_up(dispatcher, fleet)
        self._rewind(dispatcher)
        self._progress.say(f"learner and intake start again from step {self._checkpoint.step}")

    async def _take_down(self, dispatcher: Dispatcher, fleet: Fleet) -> None:
        """Stop what is left of learner and intakes, and forget what they have said."""
        for kind in (RoleKind.LEARNER, RoleKind.INTAKE):
            for role in self._plan.of_kind(kind):
                await fleet.supervisor.stop(role.name)
        dispatcher.forget()

    async def _bring_up(self, dispatcher: Dispatcher, fleet: Fleet) -> None:
        """Start learner and intakes on hosts that are there; with fewer of them where one stays away."""
        hosts = self._learner_hosts
        if hosts is not None:
            hosts.take_back()
        while True:
            try:
                await self._start_from_checkpoint(dispatcher, fleet)
                return
            except HostLostError as error:
                if hosts is None:
                    raise
                await self._take_down(dispatcher, fleet)
                await hosts.go_on_without(error)

    async def _start_from_checkpoint(self, dispatcher: Dispatcher, fleet: Fleet) -> None:
        env = self._checkpoint.environment
        learners = [role.name for role in self._plan.of_kind(RoleKind.LEARNER)]
        # those first whose host has to come back: the others would wait for them with a deadline
        for learner in sorted(learners, key=lambda name: not fleet.supervisor.lost(name)):
            await fleet.start(learner, env)
        for intake in self._plan.of_kind(RoleKind.INTAKE):
            await fleet.start(intake.name, env | {ATTEMPT_FLOOR_ENV: str(self._recoveries * ATTEMPTS_PER_RECOVERY)})
            dispatcher.watch.started(intake.name)

    def _leave_at_checkpoint(self, dispatcher: Dispatcher) -> None:
        """Cut the records to the newest checkpoint, which is where a resume goes on; every role has ended."""
        folder = self._plan.run_folder
        self._checkpoint = checkpoints.newest(folder / "checkpoints")
        self._set_aside()
        version, of_checkpoint = self._checkpoint.step, self._checkpoint.folder
        self._rewind(dispatcher)
        TrainedRecord(folder, self._progress.say, version, of_checkpoint).close()
        self._progress.say(f"stopped on the way back to step {version}, where a resume goes on")

    def _rewind(self, dispatcher: Dispatcher) -> None:
        dispatcher.ledger.rewind(self._checkpoint.step, self._checkpoint.folder)
        if self._samples is not None:
            self._samples.rewind(self._checkpoint.step)
        if self._trackers is not None:
            self._trackers.track("rewind", self._checkpoint.step)

    async def _stop(self, dispatcher: Dispatcher, fleet: Fleet) -> None:
        """Ask every role to end, then make it end, in order; a second signal cuts this short."""
        async with asyncio.TaskGroup() as group:
            orderly = group.create_task(self._stop_in_order(dispatcher, fleet), name="stop")
            # with nothing to save, the first signal is reason enough
            hurry = self._signals.first if not self._training else self._signals.second
            impatient = group.create_task(_wait(hurry), name="impatient")
            await asyncio.wait([orderly, impatient], return_when=asyncio.FIRST_COMPLETED)
            if not orderly.done():
                await fleet.stop_all(at_once=True)
            impatient.cancel()

    async def _stop_in_order(self, dispatcher: Dispatcher, fleet: Fleet) -> None:
        for kind in (RoleKind.ROLLOUT, RoleKind.TEACHER, RoleKind.INTAKE):
            await dispatcher.broadcast(kind, m.Stop("the run is over"))
        engines = {role.name for kind in ENGINES for role in self._plan.of_kind(kind)}
        # they end by themselves; a signal is sent to none but the stuck
        for _ in range(round(self._plan.topology.supervisor.stop_deadline_s / GRACE_POLL_S)):
            if not set(fleet.supervisor.running) - engines:
                break
            await asyncio.sleep(GRACE_POLL_S)
        await fleet.stop_all()


def _on_event(tracker: Tracker, trace: Trace, text: str) -> None:
    """Something worth a line has happened."""
    tracker.track("event", {"time": time.time(), "event": text})
    trace.event("events", text)


async def _race(dispatcher: Dispatcher, work: Coroutine[Any, Any, None], **events: asyncio.Event) -> str:
    """`done` when `work` ends, or the name of the event that comes first; raises what `work` or a role raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {"done": group.create_task(work, name="script"), "failed": group.create_task(_failure(dispatcher))}
            tasks |= {name: group.create_task(_wait(event)) for name, event in events.items()}
            await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
            # `tasks` is in order of precedence, for those that end in one turn of the loop: a run whose work has ended
            # is done, whatever signal came with it. A failure counts in any case: the group raises it.
            first = next(name for name, task in tasks.items() if task.done())
            for task in tasks.values():
                task.cancel()
    except ExceptionGroup:
        # a learner that dies makes waits fail too: its death is the cause, and it can be recovered from
        if "lost" in events and events["lost"].is_set():
            return "lost"
        raise
    return first


def _storage(group: ExceptionGroup[Exception]) -> StorageError | None:
    """The error of a full disk, where that alone has ended the script."""
    causes = list(leaves(group))
    found = [cause for cause in causes if isinstance(cause, StorageError)]
    return found[0] if len(found) == len(causes) else None


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def _failure(dispatcher: Dispatcher) -> None:
    # shielded: cancelling a wait for a future would cancel the future, for every later wait too
    raise await asyncio.shield(dispatcher.failed)
