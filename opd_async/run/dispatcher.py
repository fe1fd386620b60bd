"""The launcher's end of the control socket: who is up, who gets which lease, and what happens when a role dies.

    every role <-> ROUTER <-> receive -> mailbox -> the script of the run (`script.py`)
    supervisor exits -> deaths -> restart, re-lease, or back to the last checkpoint

    loop       waits for                                   unblocked by
    receive    a message of any role                       the roles
    deaths     the end of a process                        the supervisor
    leasing    a free slot that admission allows           LeaseDone, a step, a weight update
    watch      silence of a role                           the clock

On cancel: the loops end; `opd_async.run.lifecycle` decides what happens to the run.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
import zmq.asyncio

from opd_async.cluster.fleet import Fleet
from opd_async.cluster.supervisor import Exit
from opd_async.data.completions import Mix
from opd_async.data.prompts import Prompt
from opd_async.errors import OpdError, RoleError
from opd_async.plan.plan import Plan, RoleKind
from opd_async.run.barrier import Barrier
from opd_async.run.control_bounds import ControlBounds
from opd_async.run.evaluator import EVAL_IDS
from opd_async.run.ledger import Ledger
from opd_async.scheduling.admission import hold_tokens
from opd_async.scheduling.grants import Grants
from opd_async.scheduling.leases import LeaseBook
from opd_async.telemetry.metrics import RoleMetrics
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlServer
from opd_async.transport.door import Door
from opd_async.transport.mailbox import Mailbox

log = logging.getLogger(__name__)
T = TypeVar("T")

WATCH_S = 1.0
UPDATE = "update"
"""Mailbox key of what the script waits for between steps: a `LearnerReply` to a step, or `RESYNC`."""
RESYNC = "resync"


class Dispatcher:
    """The dispatcher: knows who is up, routes messages, keeps the leases."""

    def __init__(
        self,
        plan: Plan,
        fleet: Fleet,
        ledger: Ledger,
        metrics: RoleMetrics,
        context: zmq.asyncio.Context,
        prompts: Sequence[Prompt],
        mix: Mix,
    ) -> None:
        self.plan = plan
        self.fleet = fleet
        self.ledger = ledger
        self.metrics = metrics
        self.mailbox = Mailbox()
        self.door = Door(context, plan.peers, self._stranger, fleet.keys)
        self.server = ControlServer(context, plan.control, self._malformed, door=self.door, expected=fleet.incarnation)
        self.barrier = Barrier(self)
        self.book: LeaseBook | None = None
        self.version = -1
        self.learner_lost = asyncio.Event()
        self.failed: asyncio.Future[OpdError] = asyncio.get_running_loop().create_future()
        self.on_eval_done: Callable[[m.EvalDone], None] = lambda done: None
        self._grants = Grants(fleet.keys)
        self._bounds = ControlBounds(self)
        self._prompts = prompts
        self._mix = mix
        self._incarnations: dict[str, str] = {}
        self._heard: dict[str, float] = {}
        self._up: set[str] = set()
        self._lease_news = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._admitting = False
        self._tokens = itertools.count(1)
        self.engine_group = 0
        """Grows whenever the process group of learner and engines must be made anew."""
        self.evaluated = asyncio.Event()
        """Set while no evaluation runs beside training."""
        self.evaluated.set()
        self.lost: Exit | None = None
        """The end of the learner or the intake, when `learner_lost` is set."""
        self.resetting: int | None = None
        """Token of the reset under way."""

    # --- who is there ------------------------------------------------------------------------------------------------

    def up(self, kind: RoleKind) -> list[str]:
        """Names of the connected roles of a kind."""
        return [role.name for role in self.plan.of_kind(kind) if role.name in self._up]

    def name_of(self, kind: RoleKind, index: int = 0) -> str:
        """Name of a role."""
        return self.plan.role(kind, index).name

    async def broadcast(self, kind: RoleKind, message: m.Message) -> list[str]:
        """Send to every connected role of a kind; returns who got it."""
        return [name for name in self.up(kind) if await self.server.send(name, message)]

    async def to_intake(self, message: m.Message) -> None:
        """Send to the intake (and through it to the learner)."""
        await self.server.send(self.name_of(RoleKind.INTAKE), message)

    def fail(self, error: OpdError) -> None:
        """End the run with this error."""
        if not self.failed.done():
            self.failed.set_result(error)

    def forget(self) -> None:
        """The learner is gone: nothing it or the intake said counts any more."""
        self.learner_lost.clear()
        self.mailbox.clear()
        self.book = None
        self.version = -1
        self.engine_group += 1
        for kind in (RoleKind.LEARNER, RoleKind.INTAKE):
            self._up.discard(self.name_of(kind))

    # --- loops -------------------------------------------------------------------------------------------------------

    def start_loops(self, group: asyncio.TaskGroup) -> None:
        """Start the loops in `group`; `stop_loops` ends them."""
        self._group = group
        loops = {"receive": self.receive, "deaths": self.deaths, "leasing": self.leasing, "watch": self.watch}
        loops["door"] = self.door.keep
        for name, loop in loops.items():
            self.spawn(loop(), name)

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run `work` under the dispatcher's task group."""
        assert self._group is not None
        task = self._group.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _stranger(self) -> None:
        mine = self.ledger.roles["launcher"].now
        mine["strangers"] = mine.get("strangers", 0.0) + 1
        self.metrics["opd_launcher_strangers_total"].inc()

    def _malformed(self, reason: str) -> None:
        mine = self.ledger.roles["launcher"].now
        mine["malformed_frames"] = mine.get("malformed_frames", 0.0) + 1
        self.metrics["opd_launcher_malformed_total"].inc()
        log.warning("dropped %s", reason)

    def close(self) -> None:
        """Close the sockets."""
        self.server.close()
        self.door.close()

    def stop_loops(self) -> None:
        """Cancel everything that was spawned."""
        for task in list(self._tasks):
            task.cancel()

    def new_token(self) -> int:
        """A number that tells one request from the next."""
        return next(self._tokens)

    def admit(self, flow: bool) -> None:
        """Let training leases flow, or stop them."""
        self._admitting = flow
        self._lease_news.set()

    async def receive(self) -> None:
        """Dispatch every message."""
        while True:
            role, message = await self.server.receive()
            if problem := self._bounds.problem(role, message):
                self._malformed(f"a {type(message).__name__} of {role}: {problem}")
                continue
            self._heard[role] = time.monotonic()
            match message:
                case m.Heartbeat():
                    self.ledger.roles[role].now = message.counters
                case m.Acks():
                    await self._acks(message)
                case m.LeaseDone():
                    if self.book is not None:
                        self.book.ended(message.sample_id, message.attempt, message.response_tokens)
                    self._lease_news.set()
                case m.EvalDone():
                    self.on_eval_done(message)
                case m.StepStarted():
                    self._step_started(message)
                case m.Reclaimed():
                    self._reclaimed(message)
                case m.DrainRequest():
                    self.barrier.drain(message.version)
                case m.Hello():
                    await self._hello(role, message)
                case m.Failure():
                    self.metrics["opd_launcher_failures_total"].labels(role.rsplit("-", 1)[0]).inc()
                    self.fail(RoleError(f"{role}: {message.text}"))
                case m.Paused() | m.ResetDone():
                    self.mailbox.deliver((type(message).__name__, role, message.token), message)
                case m.LearnerReply(command="Train"):
                    self.mailbox.deliver(UPDATE, message)
                case m.LearnerReply():
                    self.mailbox.deliver(("reply", message.command), message)
                case m.Frontier() | m.Quiesced():
                    self.mailbox.deliver(type(message).__name__, message)
                case _:
                    log.warning("ignored a %s of %s", type(message).__name__, role)

    async def _hello(self, role: str, hello: m.Hello) -> None:
        restarted = self._incarnations.get(role, hello.incarnation) != hello.incarnation
        self._incarnations[role] = hello.incarnation
        self._up.add(role)
        if restarted:
            self.ledger.roles[role].restart()
        kind = self.fleet.role(role).kind
        if kind is RoleKind.TEACHER and restarted:
            await self.broadcast(RoleKind.ROLLOUT, m.TeacherRestarted(self.fleet.role(role).index))
        if kind in (RoleKind.ROLLOUT, RoleKind.TEACHER) and self.barrier.generating:
            await self.server.send(role, m.Resume(self.version))
        self.mailbox.deliver(("Hello", role), hello)
        self._lease_news.set()

    async def _acks(self, acks: m.Acks) -> None:
        """Pass acknowledgements on to the actors that made the chunks; hold generation when too much is ready."""
        for actor in np.unique(acks.actors):
            name = f"{RoleKind.ROLLOUT.value}-{actor}"
            if name not in self._up:
                continue
            mine = acks.actors == actor
            part = m.Acks(
                acks.next_step, 0, acks.sample_ids[mine], acks.attempts[mine], acks.actors[mine], acks.ends[mine]
            )
            await self.server.send(name, part)
        schedule = self.plan.topology.schedule
        # while a step is trained with the engines' weights; an older account would stop generation for nothing
        in_step = acks.next_step == self.version + 1
        if in_step and acks.ready_tokens >= hold_tokens(schedule.tokens_per_step, schedule.max_staleness):
            self.barrier.hold()
        if self.book is not None:
            self.book.admission.ready(acks.next_step, acks.ready_tokens)
            self._lease_news.set()

    def _step_started(self, started: m.StepStarted) -> None:
        assert self.book is not None
        columns = (started.taken_ids.tolist(), started.taken_ends.tolist(), started.taken_complete.tolist())
        for sample_id, end, complete in zip(*columns, strict=True):
            self.book.trained(sample_id, end, bool(complete))
        self._lease_news.set()
        self.mailbox.deliver(("StepStarted", started.version), started)

    # --- leases ------------------------------------------------------------------------------------------------------

    def leases_may_flow(self) -> None:
        """Something changed that may admit new leases."""
        self._lease_news.set()

    async def leasing(self) -> None:
        """Keep the actors busy as far as admission allows."""
        while True:
            await self._lease_news.wait()
            self._lease_news.clear()
            if self.book is not None and self._admitting and self.version >= 0:
                await self._lease_out(self.book)
                self.metrics["opd_launcher_leases_active"].set(self.book.active)

    async def _lease_out(self, book: LeaseBook) -> None:
        load = {name: book.generating_by(name) for name in self.up(RoleKind.ROLLOUT)}
        while load:
            actor = min(load, key=lambda name: load[name])
            spec = book.lease(actor, self.version)
            if spec is None:
                return
            load[actor] += 1
            given = self._mix.of(spec.sample_id)
            prompt = self._prompts[spec.prompt_index] if given is None else given.prompt
            lease = m.Lease(
                spec.sample_id,
                spec.attempt,
                prompt.prompt_id,
                m.LeaseKind.TRAIN.value,
                self.plan.topology.rollout.sampling.temperature,
                prompt.label,
                prompt.token_ids,
                spec.prefix,
                prompt.metadata_json,
                teacher=prompt.teacher,
                given=None if given is None else given.response,
                grant=self._grants.of(spec.sample_id, spec.attempt, self.fleet.role(actor).index),
            )
            await self.server.send(actor, lease)

    async def send_eval(self, lease: m.Lease) -> None:
        """Give an evaluation lease to a connected actor."""
        actors = self.up(RoleKind.ROLLOUT)
        if actors:
            await self.server.send(actors[(lease.sample_id - EVAL_IDS) % len(actors)], lease)

    def _reclaimed(self, message: m.Reclaimed) -> None:
        if self.book is None:
            return
        prefixes = np.split(message.tokens, np.cumsum(message.ends)[:-1])
        rows = zip(message.sample_ids.tolist(), message.attempts.tolist(), prefixes, message.complete, strict=True)
        for sample_id, attempt, prefix, complete in rows:
            self.book.give_back(sample_id, attempt, prefix, bool(complete))
        self._lease_news.set()

    # --- deaths ------------------------------------------------------------------------------------------------------

    async def deaths(self) -> None:
        """React to every process that ends without having been asked to."""
        while True:
            ended = await self.fleet.supervisor.exits.get()
            self._up.discard(ended.name)
            self._heard.pop(ended.name, None)
            self.metrics["opd_launcher_restarts_total"].labels(ended.name).inc()
            kind = self.fleet.role(ended.name).kind
            if kind in (RoleKind.LEARNER, RoleKind.INTAKE):
                self.lost = ended
                self.learner_lost.set()
                continue
            self._excuse(ended.name)
            if kind is RoleKind.ROLLOUT:
                await self._reclaim(ended.name)
            if kind is RoleKind.STUDENT_ENGINE:
                await self.broadcast(RoleKind.ROLLOUT, m.EngineDown(self._url(ended.name)))
            self.spawn(self._restart(ended, kind), f"restart-{ended.name}")

    def _excuse(self, name: str) -> None:
        """A dead role answers nothing any more: let those who wait for it go on."""
        self.barrier.absent(name)
        if self.resetting is not None:
            self.mailbox.deliver(("ResetDone", name, self.resetting), None)

    async def _restart(self, ended: Exit, kind: RoleKind) -> None:
        try:
            await self.fleet.await_restart(ended)
            await self.fleet.start(ended.name)
            if kind is RoleKind.STUDENT_ENGINE:
                await self.fleet.wait_for_engine(kind, self._url(ended.name))
                self.engine_group += 1
                self.mailbox.deliver(UPDATE, RESYNC)
        except OpdError as error:
            self.fail(error)

    async def _reclaim(self, actor: str) -> None:
        """Ask the intake what it holds of the samples of a dead actor; they are leased again behind that."""
        held = self.book.held_by(actor) if self.book is not None else []
        if held:
            ids = np.array([spec.sample_id for spec in held], np.int64)
            attempts = np.array([spec.attempt for spec in held], np.int32)
            await self.to_intake(m.Reclaim(ids, attempts))

    def _url(self, engine: str) -> str:
        return self.plan.student_engines[self.fleet.role(engine).index]

    async def watch(self) -> None:
        """Kill a role that has gone silent: its death is then handled like any other."""
        deadline_s = self.plan.topology.supervisor.heartbeat_deadline_s
        looked = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            looked, late = time.monotonic(), max(time.monotonic() - looked - 2 * WATCH_S, 0.0)
            now = looked
            # while this process stood still (a stopped job, a machine that slept) nobody could be heard
            self._heard = {role: heard + late for role, heard in self._heard.items()}
            for role, heard in list(self._heard.items()):
                talks = self.fleet.role(role).kind is not RoleKind.LEARNER
                if talks and now - heard > deadline_s and role in self.fleet.supervisor.running:
                    log.error("%s has been silent for %.0f s: killing it", role, now - heard)
                    self._heard.pop(role)
                    self.fleet.supervisor.kill(role)
