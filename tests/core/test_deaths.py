"""Restarts of roles that somebody ends for good meanwhile: nothing starts them again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from deadlines import once, patience

from opd_async.cluster.nodes import HostLostError
from opd_async.cluster.supervisor import Exit
from opd_async.errors import OpdError
from opd_async.plan.plan import RoleKind
from opd_async.run.barrier import Barrier
from opd_async.run.deaths import Deaths
from opd_async.run.state import RESYNC, UPDATE, RunState
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport import messages as m
from opd_async.transport.mailbox import Mailbox

ACTOR, ENGINE, OTHER = "rollout-1", "student-engine-0", "student-engine-1"


class Fleet:
    """Of the fleet, what deaths look at; a restart waits for `go`."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.lost = set[str]()
        self.supervisor = SimpleNamespace(exits=asyncio.Queue(), running=(OTHER,), lost=self.lost.__contains__)
        self.say = self.said.append
        self.away, self.left = set[str](), set[str]()
        self.restarting, self.go = asyncio.Event(), asyncio.Event()
        self.host_is_away = False
        self.started: list[str] = []
        self.answers: list[asyncio.Future[None]] = []
        """Of an engine: what becomes of each wait for it."""

    def role(self, name: str) -> Any:
        kind = RoleKind.ROLLOUT if name == ACTOR else RoleKind.STUDENT_ENGINE
        return SimpleNamespace(name=name, kind=kind, host="127.0.0.1", ports={"http": 1})

    async def await_restart(self, ended: Exit) -> None:
        self.restarting.set()
        await self.go.wait()

    async def start(self, name: str) -> None:
        if self.host_is_away:
            raise HostLostError(f"the host of {name} has not come back")
        self.started.append(name)

    async def wait_for_engine(self, kind: RoleKind, url: str) -> None:
        self.answers.append(asyncio.get_running_loop().create_future())
        await self.answers[-1]


class Peers:
    """Of the comparison of engines, what deaths tell it; `alone` is an actor that would have no engine left."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.alone: str | None = None

    async def restarted(self, name: str) -> None:
        """No engine is slow."""

    async def given_up(self, name: str) -> None:
        self.given.append(name)

    def without_engine(self, name: str, running: Any) -> str | None:
        return self.alone


class Reach:
    """A run that has leased nothing."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self.fleet: Any = Fleet()
        roles = [self.fleet.role(name) for name in (ENGINE, ACTOR, OTHER)]
        self.plan: Any = SimpleNamespace(of_kind=lambda kind: [role for role in roles if role.kind is kind])
        self.metrics = RoleMetrics("launcher")
        self.mailbox, self.state = Mailbox(), RunState()
        self.barrier: Barrier = SimpleNamespace(absent=lambda name: None)  # type: ignore[assignment]
        self.learner_lost = asyncio.Event()
        self.watch: Any = SimpleNamespace(ended=lambda name: None, started=lambda name: None, heard=lambda name: None)
        self.slow_engines: Any = Peers()
        self.gone_roles: list[str] = []
        self.failures: list[OpdError] = []
        self.sizes: list[set[str]] = []
        """Who was away each time that the number of slots was looked at."""

    def gone(self, role: str) -> None:
        self.gone_roles.append(role)

    def resize(self) -> None:
        self.sizes.append(set(self.fleet.away))

    def fail(self, error: OpdError) -> None:
        self.failures.append(error)

    async def broadcast(self, kind: RoleKind, message: m.Message) -> list[str]:
        return []

    async def to_intake(self, message: m.Message) -> None:
        raise AssertionError("nothing is leased")

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return self._group.create_task(work, name=name)


@asynccontextmanager
async def a_run() -> AsyncIterator[tuple[Reach, Deaths]]:
    async with asyncio.TaskGroup() as group:
        reach = Reach(group)
        deaths = Deaths(reach)
        loop = group.create_task(deaths.run())
        yield reach, deaths
        loop.cancel()


async def dies(reach: Reach, name: str = ACTOR) -> None:
    """The role is killed, and its restart begins."""
    reach.fleet.restarting.clear()
    await reach.fleet.supervisor.exits.put(Exit(name, -9, ()))
    async with asyncio.timeout(patience(5.0)):
        await reach.fleet.restarting.wait()


async def test_a_role_that_died_is_started_again() -> None:
    async with a_run() as (reach, deaths):
        await dies(reach)
        assert list(deaths.starting) == [ACTOR]
        reach.fleet.go.set()
        await once(lambda: not deaths.starting)
        assert reach.fleet.started == [ACTOR] and reach.gone_roles == [ACTOR]


async def test_a_restart_that_is_given_up_starts_nothing() -> None:
    async with a_run() as (reach, deaths):
        await dies(reach)
        await deaths.keep_down(ACTOR)
        reach.fleet.go.set()
        await deaths.keep_down(ACTOR)  # none is under way
        assert not deaths.starting and reach.fleet.started == [] and reach.failures == []
        await dies(reach)  # brought up again by somebody, it is restarted as before
        await once(lambda: bool(reach.fleet.started))


async def test_an_engine_that_dies_again_while_it_comes_up_has_its_whole_time_once_more() -> None:
    """The wait for the process that has ended would have come to its deadline, and ended the run."""
    async with a_run() as (reach, deaths):
        fleet = reach.fleet
        fleet.go.set()
        await dies(reach, ENGINE)
        await once(lambda: len(fleet.answers) == 1)
        await dies(reach, ENGINE)
        await once(lambda: len(fleet.answers) == 2)
        first, second = fleet.answers
        assert first.cancelled() and fleet.started == [ENGINE] * 2 and list(deaths.starting) == [ENGINE]
        second.set_result(None)
        assert await reach.mailbox.expect(UPDATE, patience(5.0), "the engine to ask for weights") == RESYNC
        await once(lambda: not deaths.starting)
        assert reach.failures == [] and reach.state.engine_group == 1


@pytest.mark.parametrize("lost", [True, False])
async def test_the_work_of_an_engine_goes_to_others_as_soon_as_its_host_is_lost(lost: bool) -> None:
    """One that died alone is soon there again, and its responses wait for it."""
    async with a_run() as (reach, deaths):
        reach.fleet.lost.update([ENGINE] * lost)
        await dies(reach, ENGINE)
        assert reach.slow_engines.given == [ENGINE] * lost
        await deaths.keep_down(ENGINE)


async def test_an_engine_whose_host_stays_away_takes_its_slots_with_it() -> None:
    async with a_run() as (reach, deaths):
        reach.fleet.host_is_away = True
        reach.fleet.go.set()
        await dies(reach, ENGINE)
        await once(lambda: not deaths.starting)
        assert reach.sizes == [{ENGINE}] and reach.failures == [] and reach.slow_engines.given == [ENGINE]
        assert reach.fleet.said == [f"going on without {ENGINE}: the host of {ENGINE} has not come back"]


async def test_an_engine_without_which_a_living_actor_has_none_ends_the_run() -> None:
    async with a_run() as (reach, deaths):
        reach.fleet.host_is_away, reach.slow_engines.alone = True, "rollout-0"
        reach.fleet.go.set()
        await dies(reach, ENGINE)
        await once(lambda: not deaths.starting)
        assert reach.fleet.away == set() and reach.fleet.said == [] and reach.slow_engines.given == []
        (failure,) = reach.failures
        assert str(failure) == (
            f"the host of {ENGINE} has not come back; rollout-0, which is on another host, has no other engine; write "
            "rollout.replicas so that each host with student engines has an actor of its own"
        )


@pytest.mark.parametrize("left", [True, False])
async def test_the_end_of_a_role_that_has_left_is_noted_and_no_more(left: bool) -> None:
    async with a_run() as (reach, deaths):
        reach.fleet.left.update([ACTOR] * left)
        await reach.fleet.supervisor.exits.put(Exit(ACTOR, -9, ()))
        await once(lambda: bool(reach.gone_roles))
        assert bool(deaths.starting) is not left
        await deaths.keep_down(ACTOR)
