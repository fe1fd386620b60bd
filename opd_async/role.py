"""What every asyncio role shares: its plan, its line to the dispatcher, its metrics, heartbeats and orderly end.

async with Role.open(kind, plan, index) as role:   Hello has been sent, metrics are served, heartbeats run
    role.spawn(...)                                loops of the role; the first that fails ends the process
    await role.until_stopped()                     the dispatcher's Stop, or a signal
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq.asyncio

from opd_async.clock import WALL, Clock
from opd_async.errors import InputError
from opd_async.keys import RunKeys, incarnation
from opd_async.plan.plan import Plan, RoleKind, RolePlan, counters_file
from opd_async.process import configure_logging, stop_event
from opd_async.telemetry.exporter import RoleMetrics, loop_lag
from opd_async.telemetry.features import features_of
from opd_async.telemetry.trace import OFF, Trace
from opd_async.transport.channels import ControlClient
from opd_async.transport.door import Door, Passport
from opd_async.transport.messages import Heartbeat, Hello

HEARTBEAT_S = 0.5
ATTEMPT_FLOOR_ENV = "OPD_ATTEMPT_FLOOR"
"""Set for the intake: attempts below it belong to a time before the learner went back to a checkpoint."""


def read_plan(path: Path) -> Plan:
    """The plan that the launcher wrote, with the keys of this process's environment; `InputError` when it is none."""
    try:
        plan = Plan.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a plan ({error}); roles are started by opd_async.launch") from None
    keys = RunKeys.of_environment()
    return plan if keys is None else plan.with_keys(keys)


@dataclass(slots=True)
class IdleClock:
    """Adds up the time in which nothing was being done; `busy` is set by the owner on each change."""

    idle_s: float = 0.0
    _since: float = field(default_factory=time.monotonic)
    _busy: bool = False

    def set_busy(self, busy: bool) -> None:
        """Account for the time since the last call under the old state."""
        now = time.monotonic()
        if not self._busy:
            self.idle_s += now - self._since
        self._since, self._busy = now, busy

    def total(self) -> float:
        """Idle seconds up to now."""
        self.set_busy(self._busy)
        return self.idle_s


@dataclass(slots=True, kw_only=True)
class Role:
    """One role process: `counters` are running totals that travel with each heartbeat."""

    plan: Plan
    mine: RolePlan
    context: zmq.asyncio.Context
    control: ControlClient
    metrics: RoleMetrics
    group: asyncio.TaskGroup
    signalled: asyncio.Event
    clock: Clock = field(default_factory=Clock)
    counters: dict[str, float] = field(default_factory=dict)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    door: Door | None = None
    """Who may connect to the sockets that this role binds."""
    trace: Trace = OFF
    refresh: Callable[[], None] = lambda: None
    """Brings counters up to date before each heartbeat."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The role's name in the plan."""
        return self.mine.name

    @property
    def passport(self) -> Passport | None:
        """What the role shows where it connects."""
        return Passport.of_environment(self.name)

    @property
    def chunk_passport(self) -> Passport | None:
        """What the role shows where it sends chunks."""
        return self.passport if self.plan.guards_chunks else None

    def guard(self) -> Door:
        """Begin to watch who connects to the sockets that this role binds."""
        self.door = Door(self.context, self.plan.peers, self._stranger)
        self.spawn(self.door.keep(), "door")
        return self.door

    def _stranger(self) -> None:
        self.count("strangers")
        self.metrics[f"opd_{self.mine.kind.value}_strangers_total"].inc()

    def count(self, counter: str, amount: float = 1.0) -> None:
        """Add to one of the totals that the dispatcher sees."""
        self.counters[counter] = self.counters.get(counter, 0.0) + amount

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run a loop of the role under its task group."""
        task = self.group.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _heartbeats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self.refresh()
            WALL.refresh()
            await self.control.send(Heartbeat(self.name, dict(self.counters)))

    @classmethod
    @asynccontextmanager
    async def open(cls, kind: RoleKind, plan: Plan, index: int) -> AsyncIterator[Role]:
        """Connect to the dispatcher and serve metrics.

        On cancel and at the end: loops are cancelled first, then sockets close, delivering what they hold.
        """
        mine = plan.role(kind, index)
        configure_logging(mine.name)
        metrics = RoleMetrics(kind.value, features_of(plan.topology), counters_file(plan.run_folder, mine.name))
        signalled = stop_event(asyncio.get_running_loop())
        context = zmq.asyncio.Context()
        with (
            metrics.serve(mine.host, mine.ports["metrics"]),
            Trace.of(plan, mine.name) as trace,
            ControlClient(context, plan.control, mine.name, passport=Passport.of_environment(mine.name)) as control,
        ):
            async with asyncio.TaskGroup() as group:
                role = cls(
                    plan=plan,
                    mine=mine,
                    context=context,
                    control=control,
                    metrics=metrics,
                    group=group,
                    signalled=signalled,
                    trace=trace,
                )
                await control.send(Hello(mine.name, incarnation()))
                role.spawn(role._heartbeats(), "heartbeats")
                role.spawn(control.refused(), "key")
                role.spawn(loop_lag(metrics[f"opd_{kind.value}_loop_lag_seconds"]), "loop-lag")
                try:
                    yield role
                finally:
                    role.cancel()

    async def until_stopped(self) -> None:
        """Wait for the dispatcher's `Stop` or a signal. On cancel: the role goes on."""
        ends = [self.spawn(_wait(event), "stop") for event in (self.stopped, self.signalled)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)

    def cancel(self) -> None:
        """Cancel every loop that `spawn` started; the role's task group then ends."""
        for task in list(self._tasks):
            task.cancel()


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


def role_arguments(description: str) -> tuple[Plan, int]:
    """`--plan FILE [--index I]`: what every role is started with."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--plan", type=Path, required=True, help="plan.json, written by the launcher")
    parser.add_argument("--index", type=int, default=0, help="which replica this is")
    arguments = parser.parse_args()
    return read_plan(arguments.plan), arguments.index
