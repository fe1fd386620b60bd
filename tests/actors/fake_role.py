"""A role without a launcher: the actor's sockets and HTTP are real, the dispatcher is two queues."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import zmq.asyncio
from deadlines import patience

from opd_async.clock import Clock
from opd_async.config.topology import ONE_TEACHER, Topology
from opd_async.plan.free_ports import free_ports
from opd_async.plan.plan import Plan, RoleKind, RolePlan
from opd_async.role import Role
from opd_async.scheduling.further import FURTHER_IDS
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlClient

POLL_S = 0.01
SPEED = 50.0


class Dispatcher:
    """What the actor hears and says. While it `leases`, whoever asks for a further sample gets one."""

    def __init__(self) -> None:
        self.to_role: asyncio.Queue[Any] = asyncio.Queue()
        self.said: list[Any] = []
        self.leases = True
        self._further = itertools.count(FURTHER_IDS)

    async def send(self, message: Any) -> None:
        self.said.append(message)
        if isinstance(message, m.FurtherWanted) and self.leases:
            await self.lease_further(message)

    async def lease_further(self, wanted: m.FurtherWanted) -> None:
        """Answer who has asked."""
        sample_id = next(self._further)
        await self.to_role.put(m.FurtherLease(wanted.sample_id, wanted.attempt, sample_id, sample_id - FURTHER_IDS + 7))

    async def receive(self) -> Any:
        return await self.to_role.get()

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.said if isinstance(message, kind)]


def make_plan(vocab_size: int, student_urls: tuple[str, ...], teacher_urls: tuple[str, ...], **sections: Any) -> Plan:
    """One actor of each kind and external engines; `sections` are those of the topology."""
    control, scored, batches, chunks = (f"tcp://127.0.0.1:{port}" for port in free_ports("127.0.0.1", 4))
    topology = {
        "name": "test",
        "models": {"student": {"path": "s"}, "teacher": {"path": "t"}},
        "data": {"train": {"path": "p.jsonl"}},
        "schedule": {"steps": 1},
        "engines": {side: {"kind": "external"} for side in ("student", "teacher")},
    }
    roles = tuple(
        RolePlan(
            kind=kind, index=0, host="127.0.0.1", devices=("cpu",), command=(), ports={"metrics": 0}, teacher=teacher
        )
        for kind, teacher in ((RoleKind.TEACHER, ONE_TEACHER), (RoleKind.ROLLOUT, ""))
    )
    return Plan(
        topology=Topology.model_validate(topology | sections),
        run_folder=Path("nowhere"),
        control=control,
        launcher_metrics_port=0,
        scored=(scored,),
        batches=(batches,),
        chunks=(chunks,),
        student_engines=student_urls,
        teacher_urls={ONE_TEACHER: teacher_urls},
        vocab_size=vocab_size,
        student_rows=vocab_size,
        teacher_rows={ONE_TEACHER: vocab_size},
        stop_token_ids=(),
        roles=roles,
    )


class FastClock(Clock):
    """Cool-downs and backoffs of a fiftieth of their length: every second of the actor is 20 ms of the test."""

    def now(self) -> float:
        return SPEED * super().now()

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds / SPEED)

    def timeout(self, seconds: float | None) -> asyncio.Timeout:
        return super().timeout(None if seconds is None else seconds / SPEED)


@asynccontextmanager
async def fake_role(plan: Plan, kind: RoleKind, index: int = 0) -> AsyncIterator[tuple[Role, Dispatcher]]:
    """A role whose loops are cancelled when the block ends."""
    dispatcher, context = Dispatcher(), zmq.asyncio.Context()
    control = cast(ControlClient, dispatcher)
    try:
        async with asyncio.TaskGroup() as group:
            role = Role(
                plan=plan,
                mine=plan.role(kind, index),
                context=context,
                control=control,
                metrics=RoleMetrics(kind.value),
                group=group,
                signalled=asyncio.Event(),
                clock=FastClock(),
            )
            try:
                yield role, dispatcher
            finally:
                role.cancel()
    finally:
        context.destroy(linger=0)


async def until(true: Callable[[], bool], what: str, deadline_s: float = 20.0) -> None:
    """Wait for something that a loop of the actor brings about."""
    give_up = time.monotonic() + patience(deadline_s)
    while time.monotonic() < give_up:
        if true():
            return
        await asyncio.sleep(POLL_S)
    raise AssertionError(f"{what}: not within {patience(deadline_s):.0f} s")


def value(role: Role, name: str, **labels: str) -> float:
    """A metric's value now."""
    found = role.metrics.registry.get_sample_value(name, labels or None)
    return 0.0 if found is None else found
