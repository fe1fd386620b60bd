"""Leases behind prompts of a function that takes its time: who ends meanwhile gets none, and keeps none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from deadlines import once, patience
from small_runs import small_topology

from opd_async.config.topology import ONE_TEACHER, ScheduleSection, StepRule
from opd_async.data.completions import CompletionSet, Mix
from opd_async.data.own_prompts import OwnPrompts
from opd_async.data.prompts import Prompt
from opd_async.keys import RunKeys
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import make_plan
from opd_async.run.leasing import Leasing
from opd_async.run.state import RunState
from opd_async.scheduling import frontier
from opd_async.scheduling.leases import LeaseBook, PromptOrder, admission_of
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport import messages as m

FIRST, SECOND = "rollout-0", "rollout-1"
SLOTS = 6


class Slow(OwnPrompts):
    """Prompts that come when the test says so."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.asked, self.go = asyncio.Event(), threading.Event()

    def __getitem__(self, index: Any) -> Any:
        self._loop.call_soon_threadsafe(self.asked.set)
        assert self.go.wait(patience(20.0))
        return Prompt(index, np.ones(2, np.int32), "x", {}, teacher=ONE_TEACHER)


class Reach:
    """A run with two actors, which keeps what is sent to them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.state = RunState(version=0, book=book())
        self.metrics = RoleMetrics("launcher")
        self.sent: list[tuple[str, m.Lease]] = []
        self.server: Any = SimpleNamespace(send=self._send)
        self.actors = {FIRST: "first", SECOND: "first"}
        """The incarnation of each that is up."""
        self.fleet: Any = SimpleNamespace(keys=RunKeys.draw(), role=plan_role, incarnation=self.actors.get)

    def up(self, kind: RoleKind) -> list[str]:
        assert kind is RoleKind.ROLLOUT
        return sorted(self.actors)

    async def _send(self, actor: str, lease: m.Lease) -> bool:
        self.sent.append((actor, lease))
        return True


def plan_role(name: str) -> Any:
    return SimpleNamespace(index=int(name.rpartition("-")[2]))


def book(attempt: int = 0) -> LeaseBook:
    """One that leases until its slots are full."""
    schedule = ScheduleSection(steps=1, rule=StepRule.FILLED, tokens_per_step=10_000, max_staleness=None)
    return LeaseBook(frontier.empty(0), PromptOrder(100, 1, 0, False), admission_of(schedule), SLOTS, attempt)


@asynccontextmanager
async def waiting_for_a_prompt(folder: Path) -> AsyncIterator[tuple[Reach, Leasing, Slow]]:
    """Leases flow, and the prompt of the first one is on its way."""
    reach, prompts = Reach(make_plan(small_topology(folder))), Slow()
    leasing = Leasing(reach, prompts, Mix(CompletionSet().completions, 1.0, 0, False))
    async with asyncio.TaskGroup() as group:
        loop = group.create_task(leasing.run())
        leasing.admit(True)
        try:
            async with asyncio.timeout(patience(5.0)):
                await prompts.asked.wait()
            yield reach, leasing, prompts
        finally:
            prompts.go.set()
            loop.cancel()


def given(reach: Reach) -> set[tuple[int, int]]:
    return {(lease.sample_id, lease.attempt) for _, lease in reach.sent}


@pytest.mark.parametrize("back", [False, True])
async def test_an_actor_that_ends_meanwhile_is_leased_nothing(tmp_path: Path, back: bool) -> None:
    """Its lease was reclaimed: another start of it is not sent that either."""
    async with waiting_for_a_prompt(tmp_path) as (reach, _, prompts):
        leases = reach.state.book
        assert leases is not None
        (spec,) = leases.held_by(FIRST)
        del reach.actors[FIRST]
        leases.give_back(spec.sample_id, 1, np.zeros(0, np.int32), False)
        if back:
            reach.actors[FIRST] = "second"
        prompts.go.set()
        await once(lambda: len(reach.sent) >= SLOTS)
        assert given(reach) == {(spec.sample_id, 1), *((sample_id, 0) for sample_id in range(1, SLOTS))}
        assert {actor for actor, _ in reach.sent} == ({FIRST, SECOND} if back else {SECOND})
        assert len(leases.held_by(FIRST)) == (SLOTS // 2 if back else 0)


async def test_leases_from_before_a_recovery_are_not_given_after_it(tmp_path: Path) -> None:
    async with waiting_for_a_prompt(tmp_path) as (reach, leasing, prompts):
        before = reach.state.book
        reach.state.book = book(attempt=1000)
        leasing.look_again()
        prompts.go.set()
        await once(lambda: len(reach.sent) >= SLOTS)
        assert given(reach) == {(sample_id, 1000) for sample_id in range(SLOTS)}
        assert before is not None and before.active == 1
