"""Receive and send on the control socket: who is up, and who gets which message.

    every role <-> ROUTER <-> receive -> mailbox -> the script of the run (`script.py`)
    supervisor exits -> Deaths (`deaths.py`) -> restart, re-lease, or back to the last checkpoint

    loop       waits for                                   unblocked by
    receive    a message of any role                       the roles
    deaths     the end of a process                        the supervisor
    leasing    a free slot that admission allows           LeaseDone, a step, a weight update
    watch      what hangs (`watch.py`)                     the clock
    slow       engines to try again (`slow_engines.py`)    the clock

On cancel: the loops end; `opd_async.run.lifecycle` decides what happens to the run.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import zmq.asyncio

from opd_async.cluster.fleet import Fleet
from opd_async.data.completions import Mix
from opd_async.data.prompts import Prompt
from opd_async.errors import DeadlineError, OpdError, RoleError
from opd_async.plan.plan import Plan, RoleKind
from opd_async.run.barrier import Barrier, BarrierState
from opd_async.run.control_bounds import ControlBounds
from opd_async.run.deaths import Deaths
from opd_async.run.leasing import Leasing
from opd_async.run.ledger import Ledger
from opd_async.run.slow_engines import SlowEngines
from opd_async.run.state import UPDATE, RunState
from opd_async.run.suspects import Suspects
from opd_async.run.watch import Watch
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.telemetry.trace import OFF, Trace
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlServer
from opd_async.transport.door import Door
from opd_async.transport.mailbox import Mailbox

log = logging.getLogger(__name__)
T = TypeVar("T")


async def _nothing() -> None:
    """Nobody leaves."""


class Dispatcher:
    """Knows who is up, routes messages, and reacts to the end of a role."""

    def __init__(
        self,
        plan: Plan,
        fleet: Fleet,
        ledger: Ledger,
        metrics: RoleMetrics,
        context: zmq.asyncio.Context,
        prompts: Sequence[Prompt],
        mix: Mix,
        trace: Trace = OFF,
    ) -> None:
        self.plan = plan
        self.fleet = fleet
        self.ledger = ledger
        self.metrics = metrics
        self.trace = trace
        self.mailbox = Mailbox()
        self.door = Door(context, plan.peers, self._stranger, fleet.keys)
        self.server = ControlServer(context, plan.control, self._malformed, door=self.door, expected=fleet.incarnation)
        self.barrier = Barrier(self)
        self.state = RunState()
        self.learner_lost = asyncio.Event()
        self.failed: asyncio.Future[OpdError] = asyncio.get_running_loop().create_future()
        self.on_sample: Callable[[m.TrainedSample], None] = lambda sample: None
        self.on_eval_done: Callable[[m.EvalDone], None] = lambda done: None
        self.on_gone: Callable[[str], None] = lambda role: None
        """Called with a role whose process has ended, before another may be started."""
        self.before_update: Callable[[], Awaitable[None]] = _nothing
        """Called when generation has stopped for new weights: who leaves the run leaves then."""
        self.on_updated: Callable[[Sequence[str]], None] = lambda urls: None
        """Called with the engines that have just got the weights."""
        self._bounds = ControlBounds(self)
        self.watch = Watch(self)
        self.slow_engines, self.suspects = SlowEngines(self), Suspects(plan.run_folder, fleet.say)
        self.mailbox.witness, self.mailbox.idle_s = self.watch.witness, self.watch.idle_s
        self.deaths = Deaths(self)
        self.leasing = Leasing(self, prompts, mix)
        self._incarnations: dict[str, str] = {}
        self._up: set[str] = set()
        self._arrived = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._requests = itertools.count(1)
        self.evaluated = asyncio.Event()
        """Set while no evaluation runs beside training."""
        self.evaluated.set()

    # --- who is there ------------------------------------------------------------------------------------------------

    def up(self, kind: RoleKind) -> list[str]:
        """Names of the connected roles of a kind."""
        return [role.name for role in self.plan.of_kind(kind) if role.name in self._up]

    def name_of(self, kind: RoleKind, index: int = 0) -> str:
        """Name of a role as the plan, its log and its messages have it."""
        return self.plan.role(kind, index).name

    async def send(self, role: str, message: m.Message) -> bool:
        """Send to a role; False when it is not connected."""
        return await self.server.send(role, message)

    async def broadcast(self, kind: RoleKind, message: m.Message) -> list[str]:
        """Send to every connected role of a kind; returns the names of those that it was queued for."""
        return [name for name in self.up(kind) if await self.server.send(name, message)]

    async def to_intake(self, message: m.Message) -> None:
        """Send to the intake (and through it to the learner)."""
        await self.server.send(self.name_of(RoleKind.INTAKE), message)

    async def answer(self, key: Hashable, deadline_s: float, who: str, role: str) -> Any:
        """What `role` answers, or None once it has died; one that does not answer is killed, and so dies.

        Raises `DeadlineError` if not even its end is seen. On cancel: the answer stays in the mailbox.
        """
        try:
            return await self.mailbox.expect(key, deadline_s, who)
        except DeadlineError as error:
            self.watch.unanswered(role, str(error))
            return await self.mailbox.expect(key, deadline_s, f"the end of {role}")

    def grow(self, plan: Plan) -> None:
        """Take over a plan that has more roles, or another learner, and look after its engines."""
        new = {role.name for role in plan.roles} - {role.name for role in self.plan.roles}
        self.plan = plan
        self.fleet.grow(plan)
        self.ledger.grow(plan)
        self._bounds.grow()
        self.watch.grow()
        self.watch.look_after_engines(new)

    @property
    def slots(self) -> int:
        """Responses that may be generated at once: `rollout.slots`, in proportion where engines have joined or left."""
        planned, urls = self.plan.topology.engines.student.replicas, self.plan.student_engines
        if not self.plan.topology.engines.student.started:
            return self.plan.topology.rollout.slots
        return max(self.plan.topology.rollout.slots * len(set(urls) - self.fleet.urls_away()) // planned, 1)

    def resize(self) -> None:
        """Let as many responses be generated at once as there are engines for."""
        if self.state.book is not None:
            self.state.book.resize(self.slots)
        self.leasing.look_again()

    async def until_up(self, role: str, deadline_s: float) -> None:
        """Wait until a role is connected. Raises `DeadlineError`. On cancel: nothing has changed."""
        try:
            async with asyncio.timeout(deadline_s):
                while role not in self._up:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            log = self.fleet.log_folder() / f"{role}.log"
            raise DeadlineError(f"{role} has not come up in {deadline_s:.0f} s; see {log}") from None

    async def actor_for(self, number: int) -> str:
        """A connected rollout actor, by remainder, so that all have as many; the first to come while there is none.

        On cancel: nothing has changed.
        """
        while not (actors := self.up(RoleKind.ROLLOUT)):
            self._arrived.clear()
            await self._arrived.wait()
        return actors[number % len(actors)]

    def gone(self, role: str) -> None:
        """Note that the process of a role has ended: it is not connected any more."""
        self._up.discard(role)
        self.on_gone(role)

    def fail(self, error: OpdError) -> None:
        """End the run with this error; the first one counts."""
        if not self.failed.done():
            self.failed.set_result(error)

    def forget(self) -> None:
        """The learner is gone: nothing it or the intake said counts any more."""
        self.learner_lost.clear()
        self.mailbox.clear()
        self.state.forget()
        for role in (*self.plan.of_kind(RoleKind.LEARNER), *self.plan.of_kind(RoleKind.INTAKE)):
            self.gone(role.name)
            # stopped by the run itself, they would seem to be silent while they are started again
            self.watch.ended(role.name)

    # --- loops -------------------------------------------------------------------------------------------------------

    def start_loops(self, group: asyncio.TaskGroup) -> None:
        """Start the loops in `group`; `stop_loops` ends them."""
        self._group = group
        loops = {"receive": self.receive, "deaths": self.deaths.run, "leasing": self.leasing.run}
        loops |= {"watch": self.watch.run, "slow-engines": self.slow_engines.run, "door": self.door.keep}
        for name, loop in loops.items():
            self.spawn(loop(), name)
        self.watch.look_after_engines()

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run `work` in the background until it ends or the run does; its error ends the run."""
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

    def new_request(self) -> int:
        """A number that tells one request to the roles from the next."""
        return next(self._requests)

    async def receive(self) -> None:
        """Receive every message of the roles, and act on it or hand it to who waits for it."""
        while True:
            role, message = await self.server.receive()
            if problem := self._bounds.problem(role, message):
                self._malformed(f"a {type(message).__name__} of {role}: {problem}")
                continue
            if isinstance(message, m.RankBeat):
                self.watch.beat(role, message)
                continue
            self.watch.heard(role)
            match message:
                case m.Heartbeat():
                    self.ledger.roles[role].now = message.counters
                case m.Acks():
                    await self._acks(message)
                case m.LeaseDone() | m.LeaseAway() | m.FurtherUnused():
                    self._slot(message)
                case m.FurtherWanted():
                    await self.leasing.further(role, message)
                case m.EnginePace():
                    await self.slow_engines.heard(message)
                case m.SuspectScores():
                    self.suspects.add(message)
                case m.EvalDone():
                    self.on_eval_done(message)
                case m.PartStarted():
                    self._taken(message, message.tokens)
                case m.StepStarted():
                    self._step_started(message)
                case m.TrainedSample():
                    self.on_sample(message)
                case m.Reclaimed():
                    self.state.reclaiming.remove(frozenset(message.sample_ids.tolist()))
                    self.leasing.reclaimed(message)
                case m.DrainRequest():
                    self.barrier.drain(message.version)
                case m.Hello():
                    await self._hello(role, message)
                case m.Failure():
                    self.metrics["opd_launcher_failures_total"].labels(role.rsplit("-", 1)[0]).inc()
                    self.fail(RoleError(f"{role}: {message.text}"))
                case m.Paused():
                    self.barrier.paused(role, message)
                case m.ResetDone():
                    del self.state.resetting[role]
                    self.mailbox.deliver(("ResetDone", role, message.request), message)
                case m.LearnerReply(command="Train"):
                    self.mailbox.deliver(UPDATE, message)
                case m.LearnerReply():
                    self.mailbox.deliver(("reply", message.command), message)
                case m.NotSaved():
                    reply = m.LearnerReply("SaveCheckpoint", message.version, message.text, {})
                    self.mailbox.deliver(("reply", reply.command), reply)
                case m.Frontier() | m.Quiesced():
                    self.mailbox.deliver(type(message).__name__, message)
                case _:
                    log.warning("ignored a %s of %s", type(message).__name__, role)

    def _slot(self, message: m.LeaseDone | m.LeaseAway | m.FurtherUnused) -> None:
        """Note that a response needs its slot no more, or not now, or again."""
        book = self.state.book
        if book is not None:
            if isinstance(message, m.LeaseDone):
                book.ended(message.sample_id, message.attempt, message.response_tokens - message.given_tokens)
            elif isinstance(message, m.LeaseAway):
                book.away(message.sample_id, message.attempt, message.away)
            else:
                book.unused(message.sample_id, message.attempt)
        self.leasing.look_again()

    async def _hello(self, role: str, hello: m.Hello) -> None:
        restarted = self._incarnations.get(role, hello.incarnation) != hello.incarnation
        self._incarnations[role] = hello.incarnation
        self._up.add(role)
        self._arrived.set()
        if restarted:
            self.ledger.roles[role].restart()
        kind = self.fleet.role(role).kind
        if kind is RoleKind.TEACHER and restarted:
            await self.broadcast(RoleKind.ROLLOUT, m.TeacherRestarted(self.fleet.role(role).index))
        opened = self.barrier.state is BarrierState.OPEN
        if kind is RoleKind.TEACHER and self.plan.topology.opd.on_student_engines:
            # engines score also while generation stands, but not while they are sent weights
            opened = self.state.version >= 0 and not self.barrier.scores_stopped
        if kind in (RoleKind.ROLLOUT, RoleKind.TEACHER) and opened:
            await self.server.send(role, m.Resume(self.state.version))
        if kind in (RoleKind.ROLLOUT, RoleKind.TEACHER):
            await self.slow_engines.tell(role)
        self.mailbox.deliver(("Hello", role), hello)
        self.leasing.look_again()

    async def _acks(self, acks: m.Acks) -> None:
        """Pass acknowledgements on to the actors that made the chunks; stop generation when too much is ready."""
        for actor in np.unique(acks.actors):
            name = f"{RoleKind.ROLLOUT.value}-{actor}"
            if name not in self._up:
                continue
            mine = acks.actors == actor
            part = m.Acks(
                next_step=acks.next_step,
                ready_tokens=0,
                taken_tokens=0,
                idle=False,
                hold=None,
                sample_ids=acks.sample_ids[mine],
                attempts=acks.attempts[mine],
                actors=acks.actors[mine],
                ends=acks.ends[mine],
            )
            await self.server.send(name, part)
        # an account of older weights would stop generation for nothing
        hold = acks.hold == self.state.version
        if hold:
            self.barrier.close_early()
        if self.state.book is not None:
            admission = self.state.book.admission
            if hold:
                admission.held()
            admission.ready(acks.next_step, acks.ready_tokens)
            if acks.next_step == self.state.version:
                admission.opened(acks.taken_tokens, acks.idle)
            self.leasing.look_again()

    def _taken(self, part: m.PartStarted | m.StepStarted, tokens: int) -> None:
        """Note a part of the open step, which has `tokens` with it."""
        assert self.state.book is not None
        given = np.zeros(len(part.taken_ids), np.int32) if part.taken_given is None else part.taken_given
        columns = (part.taken_ids, part.taken_ends, part.taken_complete, given)
        for sample_id, end, complete, among in zip(*(column.tolist() for column in columns), strict=True):
            self.state.book.trained(sample_id, end, bool(complete), among)
        self.state.book.admission.opened(tokens, False)
        self.leasing.look_again()

    def _step_started(self, started: m.StepStarted) -> None:
        self._taken(started, int(started.stats["tokens"]))
        self.mailbox.deliver(("StepStarted", started.version), started)
