"""Who is waited for before a run goes on: each is said as it comes up, who never comes is named, and whoever is on a
lost host holds nobody up that others could work for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deadlines import patience
from plans_on_hosts import on_hosts, plan_of

from opd_async.cluster.fleet import Fleet, Standing
from opd_async.errors import DeadlineError, RoleError
from opd_async.keys import RunKeys
from opd_async.plan.plan import Plan, RoleKind
from opd_async.run import arrivals
from opd_async.run.arrivals import INTAKE, Arrivals, Expected, all_up, listed
from opd_async.transport.mailbox import Mailbox

LONG_S = 600.0


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "LOOK_S", 0.01)


def expected(**waits: Coroutine[Any, Any, Any]) -> dict[str, Expected]:
    """Roles by name, each with what says that it is up."""
    return {name: Expected(name, wait) for name, wait in waits.items()}


def test_everybody_is_named_as_they_come() -> None:
    said: list[str] = []

    async def main() -> dict[str, Any]:
        gates = {name: asyncio.get_running_loop().create_future() for name in ("a", "b", "c")}

        async def arrive() -> None:
            for name in ("b", "c", "a"):
                gates[name].set_result(name.upper())
                for _ in range(5):
                    await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            waits = {name: _of(gate) for name, gate in gates.items()}
            everybody = group.create_task(all_up(expected(**waits), LONG_S, said.append))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            group.create_task(arrive())
        return everybody.result()

    assert asyncio.run(main()) == {"a": "A", "b": "B", "c": "C"}
    assert said == ["waiting for a, b, c", "b: there; waiting for a, c", "c: there; waiting for a"]


async def _of(gate: asyncio.Future[str]) -> str:
    return await gate


async def _never() -> None:
    await asyncio.Event().wait()


async def _at_once() -> None:
    pass


async def _broken() -> None:
    raise RoleError("it holds another model")


def test_who_never_comes_is_named() -> None:
    waits = expected(one=_at_once(), two=_never(), three=_never())
    with pytest.raises(DeadlineError, match="timed out after 0 s waiting for two, three; see the logs"):
        asyncio.run(all_up(waits, 0.01, lambda line: None))


def test_the_reason_of_one_that_cannot_come_is_the_error() -> None:
    with pytest.raises(RoleError, match="it holds another model"):
        asyncio.run(all_up(expected(one=_never(), two=_broken()), LONG_S, lambda line: None))


def test_who_is_spared_meanwhile_is_waited_for_no_more() -> None:
    said: list[str] = []
    standings = {"one": Standing.EXPECTED, "two": Standing.SPARED}
    asyncio.run(all_up(expected(one=_at_once(), two=_never()), patience(20), said.append, standings.__getitem__))
    assert said == ["waiting for one, two", "going on without two, whose host is lost"]


def test_time_stands_while_somebody_is_held_up() -> None:
    """For many looks, each of them longer than the deadline."""
    looks = 0

    async def main() -> dict[str, Any]:
        back = asyncio.Event()

        def standing(role: str) -> Standing:
            nonlocal looks
            looks += 1
            if looks == 20:
                back.set()
            return Standing.HELD_UP

        async def comes_back() -> str:
            await back.wait()
            return "up"

        async with asyncio.timeout(patience(20)):
            return await all_up(expected(one=comes_back()), 0.001, print, standing)

    assert asyncio.run(main()) == {"one": "up"}
    assert looks == 20


def test_a_crowd_is_counted() -> None:
    assert listed(["a", "b", "c", "d"]) == "a, b, c, d"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


class Engines(Fleet):
    """A fleet whose engines are up when the test says so."""

    def __init__(self, plan: Plan, lost: set[str]) -> None:
        supervisor: Any = SimpleNamespace(lost=lost.__contains__)
        super().__init__(plan, supervisor, print, RunKeys.draw())
        self.up = {url: asyncio.Event() for url in (*plan.student_engines, *plan.teacher_engines)}
        self.asked: list[str] = []

    async def wait_for_engine(self, kind: RoleKind, url: str, deadline_s: float | None = None) -> None:
        self.asked.append(url)
        await self.up[url].wait()


class Run:
    """A run that goes back to its checkpoint: actors are connected, learner and intake come up again."""

    def __init__(self, folder: Path) -> None:
        values = ("cluster.nodes=4", "engines.student.replicas=2", "rollout.replicas=2")
        self.plan = plan_of(on_hosts(folder, 4, 1, *values))
        self.lost, self.connected = set[str](), {"rollout-0", "rollout-1", "teacher-0"}
        self.fleet = Engines(self.plan, self.lost)
        self.mailbox = Mailbox()
        self.said: list[str] = []

    def up(self, kind: RoleKind) -> list[str]:
        return [role.name for role in self.plan.of_kind(kind) if role.name in self.connected]

    def name_of(self, kind: RoleKind) -> str:
        return self.plan.role(kind, 0).name

    def lose(self, actor: str) -> None:
        """The host of this actor, as soon as it is given up."""
        node = next(role.node for role in self.plan.roles if role.name == actor)
        self.lost.update(role.name for role in self.plan.roles if role.node == node)
        self.connected -= self.lost

    def others_are_up(self, but: str = "") -> None:
        self.mailbox.deliver("Frontier", "where to go on")
        self.mailbox.deliver(("Hello", "learner-0"), "hello")
        for url, event in self.fleet.up.items():
            if url != but:
                event.set()

    async def everybody(self) -> dict[str, Any]:
        dispatcher: Any = self
        async with asyncio.timeout(patience(20)):
            return await Arrivals(dispatcher, self.said.append).everybody()


async def once(true: Callable[[], object]) -> None:
    """Return when it is true."""
    async with asyncio.timeout(patience(20)):
        while True:
            if true():
                return
            await asyncio.sleep(0.01)


async def test_a_host_that_is_lost_beside_the_learner_does_not_hold_up_its_return(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.lose("rollout-1")
    run.others_are_up(but=run.plan.student_engines[1])
    there = await run.everybody()
    assert there[INTAKE] == "where to go on" and not [who for who in there if "rollout-1" in who]
    assert run.plan.student_engines[1] not in run.fleet.asked


async def test_nor_does_one_that_is_given_up_only_then(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.others_are_up(but=run.plan.student_engines[1])
    waiting = asyncio.create_task(run.everybody())
    await once(lambda: run.plan.student_engines[1] in run.fleet.asked)
    run.lose("rollout-1")
    await waiting
    assert run.said[-1] == f"going on without the student engine at {run.plan.student_engines[1]}, whose host is lost"


async def test_the_host_of_a_teacher_is_waited_for(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.lose("teacher-0")
    (teacher,) = run.plan.teacher_engines
    run.others_are_up(but=teacher)
    waiting = asyncio.create_task(run.everybody())
    await once(lambda: teacher in run.fleet.asked)
    assert run.fleet.standing("teacher-0") is Standing.HELD_UP and not waiting.done()
    run.lost.clear()
    run.fleet.up[teacher].set()
    run.mailbox.deliver(("Hello", "teacher-0"), "hello")
    assert (await waiting)["teacher-0"] == "hello"
