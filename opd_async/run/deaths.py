"""React to the end of a role's process, whoever ended it.

who died               what follows
learner or intake      the lifecycle takes the run back to its last checkpoint
rollout actor          the intake says what it holds of the actor's samples; they are leased again behind that
student engine         the rollout actors wait for it, or, where its host is lost, have their others do its work; it
                       gets the current weights when it is up again
any but the first two  it is restarted, within the budget of the fleet; also where it ends while it comes up

loop     waits for                      unblocked by
run      the end of a process           the supervisor
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from functools import partial
from typing import Any, Protocol

import numpy as np

from opd_async.cluster.fleet import Fleet
from opd_async.cluster.nodes import HostLostError
from opd_async.cluster.supervisor import Exit
from opd_async.errors import OpdError
from opd_async.plan.plan import Plan, RoleKind
from opd_async.run.barrier import Barrier
from opd_async.run.slow_engines import SlowEngines
from opd_async.run.state import RESYNC, UPDATE, RunState
from opd_async.run.watch import Watch
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport import messages as m
from opd_async.transport.mailbox import Mailbox


class Reach(Protocol):
    """What the reactions need of the dispatcher."""

    plan: Plan
    fleet: Fleet
    metrics: RoleMetrics
    mailbox: Mailbox
    state: RunState
    barrier: Barrier
    learner_lost: asyncio.Event
    watch: Watch
    slow_engines: SlowEngines

    def gone(self, role: str) -> None:
        """Note that the role is not connected any more."""

    def resize(self) -> None:
        """Let as many responses be generated at once as there are engines for."""

    def fail(self, error: OpdError) -> None:
        """End the run with this error."""

    async def broadcast(self, kind: RoleKind, message: m.Message) -> list[str]:
        """Send to every connected role of a kind; returns whom it reached."""

    async def to_intake(self, message: m.Message) -> None:
        """Send to the intake."""

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run in the background until the run ends."""


class Deaths:
    """A loop that takes ended processes from the supervisor."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._restarts: dict[str, asyncio.Task[None]] = {}

    @property
    def starting(self) -> tuple[str, ...]:
        """Roles that are being started again."""
        return tuple(self._restarts)

    async def run(self) -> None:
        """React to every process that ends without having been asked to. On cancel: restarts under way end too."""
        reach = self._reach
        while True:
            ended = await reach.fleet.supervisor.exits.get()
            reach.gone(ended.name)
            reach.watch.ended(ended.name)
            reach.metrics["opd_launcher_restarts_total"].labels(ended.name).inc()
            kind = reach.fleet.role(ended.name).kind
            if kind in (RoleKind.LEARNER, RoleKind.INTAKE):
                reach.state.lost = ended
                reach.learner_lost.set()
                continue
            self._excuse(ended.name)
            if kind is RoleKind.ROLLOUT:
                await self._reclaim(ended.name)
            if kind is RoleKind.STUDENT_ENGINE:
                await reach.broadcast(RoleKind.ROLLOUT, m.EngineDown(self._url(ended.name)))
                if reach.fleet.supervisor.lost(ended.name):  # nobody knows for how long
                    await reach.slow_engines.given_up(ended.name)
            # one that waits for what has just ended has the deadline of that, and would end the run at it
            await self.keep_down(ended.name)
            if ended.name not in reach.fleet.left:
                restart = reach.spawn(self._restart(ended, kind), f"restart-{ended.name}")
                self._restarts[ended.name] = restart
                restart.add_done_callback(partial(self._restarted, ended.name))

    def _restarted(self, name: str, restart: asyncio.Task[None]) -> None:
        if self._restarts.get(name) is restart:
            del self._restarts[name]

    def _excuse(self, name: str) -> None:
        """Let those go on who wait for an answer of the dead role."""
        self._reach.barrier.absent(name)
        request = self._reach.state.resetting.pop(name, None)
        if request is not None:
            self._reach.mailbox.deliver(("ResetDone", name, request), None)

    async def _restart(self, ended: Exit, kind: RoleKind) -> None:
        reach = self._reach
        try:
            await reach.fleet.await_restart(ended)
            await reach.fleet.start(ended.name)
            if kind in (RoleKind.ROLLOUT, RoleKind.TEACHER):
                reach.watch.started(ended.name)
            if kind in (RoleKind.STUDENT_ENGINE, RoleKind.TEACHER_ENGINE):
                await reach.slow_engines.restarted(ended.name)
            if kind is RoleKind.STUDENT_ENGINE:
                await reach.fleet.wait_for_engine(kind, self._url(ended.name))
                reach.watch.heard(ended.name)
                reach.state.engine_group += 1
                reach.mailbox.deliver(UPDATE, RESYNC)
        except HostLostError as error:
            if (problem := self._indispensable(ended.name, kind)) is not None:
                reach.fail(HostLostError(f"{error}; {problem}"))
                return
            reach.fleet.say(f"going on without {ended.name}: {error}")
            reach.fleet.away.add(ended.name)
            if kind is RoleKind.STUDENT_ENGINE:
                await reach.slow_engines.given_up(ended.name)
            reach.resize()
        except OpdError as error:
            reach.fail(error)

    async def keep_down(self, role: str) -> None:
        """Give up the restart of a role that is under way. On cancel: the same."""
        if (restart := self._restarts.pop(role, None)) is not None:
            restart.cancel()
            await asyncio.wait([restart])

    async def leave(self, role: str) -> None:
        """React to the end of a role that was asked to end for good: as to a death, but nothing starts it again.

        On cancel: its samples may not be leased to others.
        """
        self._reach.gone(role)
        self._reach.watch.ended(role)
        self._excuse(role)
        if self._reach.fleet.role(role).kind is RoleKind.ROLLOUT:
            await self._reclaim(role)

    def _indispensable(self, name: str, kind: RoleKind) -> str | None:
        """Why the run cannot go on without a role whose host stays away; None if others do its work.

        A teacher's prompts are dealt to all of its actors and engines, and those of one that is gone would wait.
        """
        running = self._reach.fleet.supervisor.running
        if kind not in (RoleKind.STUDENT_ENGINE, RoleKind.ROLLOUT):
            return f"nobody else does the work of {name}"
        others = [role.name for role in self._reach.plan.of_kind(kind) if role.name != name]
        if not any(other in running for other in others):
            return f"{name} is the last of its kind"
        left = self._reach.slow_engines.without_engine(name, running) if kind is RoleKind.STUDENT_ENGINE else None
        if left is None:
            return None
        return (
            f"{left}, which is on another host, has no other engine; write rollout.replicas so that each host with "
            "student engines has an actor of its own"
        )

    async def _reclaim(self, actor: str) -> None:
        """Ask the intake what it holds of the samples of a dead actor; they are leased again behind that."""
        book = self._reach.state.book
        held = book.held_by(actor) if book is not None else []
        if held:
            ids = np.array([spec.sample_id for spec in held], np.int64)
            attempts = np.array([spec.attempt for spec in held], np.int32)
            self._reach.state.reclaiming.append(frozenset(ids.tolist()))
            await self._reach.to_intake(m.Reclaim(ids, attempts))

    def _url(self, engine: str) -> str:
        role = self._reach.fleet.role(engine)
        return f"http://{role.host}:{role.ports['http']}"
