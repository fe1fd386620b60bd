"""The gate between drain, weight update and an engine that comes back, without a single process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opd_async.plan.plan import RoleKind
from opd_async.run import barrier as barrier_module
from opd_async.run.barrier import Barrier, BarrierState
from opd_async.run.dispatcher import Dispatcher
from opd_async.telemetry.trace import OFF
from opd_async.transport import messages as m
from opd_async.transport.mailbox import Mailbox


def dispatcher() -> Any:
    """A dispatcher without actors that keeps what is sent to the intake and broadcast."""
    sent: list[Any] = []

    async def send(*message: Any) -> list[str]:
        sent.append(message[-1])
        return []

    evaluated = asyncio.Event()
    evaluated.set()
    return SimpleNamespace(
        up=lambda kind: [], broadcast=send, to_intake=send, evaluated=evaluated, sent=sent, trace=OFF
    )


@pytest.mark.parametrize("drain_first", [True, False])
async def test_a_returning_engine_does_not_open_what_was_drained(drain_first: bool) -> None:
    barrier = Barrier(dispatcher())
    await barrier.open(1)
    if drain_first:
        await barrier.close(drain=True)
    await barrier.close()  # the update that the returning engine asked for
    if not drain_first:
        await barrier.close(drain=True)
    await barrier.open(1, new=False)
    assert barrier.state is BarrierState.DRAINED
    await barrier.open(2)
    assert barrier.state is BarrierState.OPEN


async def test_without_a_drain_a_returning_engine_opens() -> None:
    fake = dispatcher()
    barrier = Barrier(fake)
    await barrier.open(1)
    await barrier.close()
    await barrier.open(1, new=False)
    assert barrier.state is BarrierState.OPEN
    assert [message.version for message in fake.sent if isinstance(message, m.Resume)] == [
        1
    ] * 4  # teachers hear it too


async def test_scores_of_what_was_drained_go_on_when_engines_that_score_hold_weights_again() -> None:
    """Teacher actors hear of it, rollout actors do not: no further token of this version may be made."""
    fake = dispatcher()
    told = list[tuple[RoleKind, Any]]()

    async def broadcast(kind: RoleKind, message: Any) -> list[str]:
        told.append((kind, message))
        return []

    fake.broadcast = broadcast
    barrier = Barrier(fake)
    await barrier.open(1)
    await barrier.close(drain=True)
    told.clear()
    await barrier.open(1, new=False)
    assert told == [] and not barrier.scores_stopped
    await barrier.stop_scores()
    assert barrier.scores_stopped and [(kind, type(message)) for kind, message in told] == [(RoleKind.TEACHER, m.Pause)]
    await barrier.open(1, new=False)
    assert told[1:] == [(RoleKind.TEACHER, m.Resume(1))] and barrier.state is BarrierState.DRAINED
    assert not barrier.scores_stopped


class Actors:
    """Two actors, of which `rollout-1` never answers and dies when it is killed."""

    def __init__(self) -> None:
        self.mailbox = Mailbox()
        self.barrier = Barrier(self)  # type: ignore[arg-type]
        self.killed: list[tuple[str, str]] = []
        self.watch = SimpleNamespace(unanswered=self.kill)
        self.trace = OFF

    def up(self, kind: RoleKind) -> list[str]:
        return ["rollout-0", "rollout-1"]

    def kill(self, role: str, problem: str) -> None:
        self.killed.append((role, problem))
        self.barrier.absent(role)

    async def broadcast(self, kind: RoleKind, message: Any) -> list[str]:
        if isinstance(message, m.Pause):
            ids, col = np.array([3], np.int64), np.array([1], np.int32)
            assert self.barrier.expects("rollout-0", message.request)
            assert not self.barrier.expects("rollout-0", message.request + 1)
            self.barrier.paused("rollout-0", m.Paused(message.request, ids, col, 7 * col))
        return self.up(kind)

    async def answer(self, key: Any, deadline_s: float, who: str, role: str) -> Any:
        return await Dispatcher.answer(self, key, deadline_s, who, role)  # type: ignore[arg-type]


async def test_an_actor_that_does_not_answer_is_killed_and_its_end_is_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(barrier_module, "PAUSE_DEADLINE_S", 0.05)
    actors = Actors()
    owed = await actors.barrier.close()
    assert owed.ends.tolist() == [7] and actors.barrier.state is BarrierState.CLOSED
    ((role, problem),) = actors.killed
    assert role == "rollout-1" and problem.startswith("timed out after 0 s waiting, since ")
    assert "for rollout-1 to pause" in problem
    assert actors.mailbox._unread == {} and not actors.barrier.expects("rollout-1", 1)
