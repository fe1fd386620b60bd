"""Find engines that are far slower than their peers, and have others do their work until they are tried again.

    EnginePace of the actors -> Paces (scheduling/pace.py) -> EngineSlow to the actors, or a restart

loop   waits for                                 unblocked by
run    the moment to try a slow engine again     the clock

An actor with several engines gives the work of a slow one to the others. Where an actor has but one, the engine is
restarted, once, if the run has started it; else it is named, and goes on. An engine whose host is lost is the slowest
of all: its actors give its work to others until it is started again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Protocol

from opd_async.cluster.fleet import Fleet
from opd_async.plan.plan import Plan, RoleKind
from opd_async.run.ledger import Ledger
from opd_async.scheduling.pace import Pace, Paces
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlServer

LOOK_S = 1.0


class Reach(Protocol):
    """What is needed of the dispatcher."""

    plan: Plan
    fleet: Fleet
    ledger: Ledger
    metrics: RoleMetrics
    server: ControlServer

    def up(self, kind: RoleKind) -> list[str]:
        """The connected roles of a kind."""


class SlowEngines:
    """The comparison, and what follows from it."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        times = reach.plan.topology.supervisor.slow_engine
        self._paces = None if times is None else Paces(times)
        self._restarted: set[str] = set()
        """Engines that were restarted because they were slow."""
        self._given_up: set[str] = set()
        """URLs of engines whose host is lost."""

    async def heard(self, pace: m.EnginePace) -> None:
        """Compare the pace of an engine with that of its peers. On cancel: some actors may not know the result."""
        if self._paces is None:
            return
        peers, reading = self._peers(pace.url), Pace(pace.answers, pace.wait_s, pace.token_s)
        problem = self._paces.heard(pace.url, peers, reading, time.monotonic())
        if problem is not None:
            await self._found(pace.url, problem)

    async def run(self) -> None:
        """Let slow engines have work again when their time has come. On cancel: they rest on."""
        while True:
            await asyncio.sleep(LOOK_S)
            for url in self._paces.to_try(time.monotonic()) if self._paces is not None else ():
                if url not in self._given_up:
                    self._reach.fleet.say(f"{self._name(url)} was slow: it gets work again")
                    await self._tell_all(url, False)

    async def tell(self, actor: str) -> None:
        """Tell an actor that has come up which engines are slow, or gone. On cancel: it may know of some."""
        slow = () if self._paces is None else self._paces.slow
        for url in sorted(self._given_up.union(slow)):
            await self._reach.server.send(actor, m.EngineSlow(url, True))

    async def restarted(self, role: str) -> None:
        """Give an engine work that was started again. On cancel: some actors may not know."""
        url = self._url(role)
        was_slow = self._paces is not None and self._paces.restarted(url, time.monotonic())
        if was_slow or url in self._given_up:
            self._given_up.discard(url)
            await self._tell_all(url, False)

    async def given_up(self, role: str) -> None:
        """Have the others do the work of an engine whose host is lost. On cancel: some actors may not know."""
        self._given_up.add(url := self._url(role))
        await self._tell_all(url, True)

    def without_engine(self, role: str, running: Collection[str]) -> str | None:
        """An actor that would have no engine left that runs, without the engine `role`; None if there is none."""
        names, url = self._reach.plan.engine_names, self._url(role)
        for actor in self._reach.up(RoleKind.ROLLOUT):
            driven = self._reach.plan.driven_by(actor)
            if url not in driven:  # of another actor, or behind a router, which has others to ask
                continue
            others = [names[other] for other in driven if other != url]
            if not any(other in running or other in driven for other in others):
                return actor
        return None

    async def _found(self, url: str, problem: str) -> None:
        reach, who = self._reach, self._name(url)
        reach.ledger.slow_engines[who] += 1
        reach.metrics["opd_launcher_slow_engines_total"].labels(who).inc()
        if len(self._engines_beside(url)) > 1:
            reach.fleet.say(f"{who} is slow: it takes {problem}; its work goes to its peers")
            await self._tell_all(url, True)
        elif who in reach.fleet.supervisor.running and who not in self._restarted:
            self._restarted.add(who)
            reach.fleet.say(f"{who} is slow: it takes {problem}; its actor has no other engine: killing it")
            reach.fleet.supervisor.kill(who)
        else:
            reach.fleet.say(f"{who} is slow: it takes {problem}; its actor has no other engine, so it goes on")

    async def _tell_all(self, url: str, slow: bool) -> None:
        plan = self._reach.plan
        asked = ((RoleKind.ROLLOUT, plan.student_engines), (RoleKind.TEACHER, plan.teacher_engines))
        for actor in (actor for kind, urls in asked if url in urls for actor in self._reach.up(kind)):
            await self._reach.server.send(actor, m.EngineSlow(url, slow))

    # --- who is who --------------------------------------------------------------------------------------------------

    def _url(self, role: str) -> str:
        """The URL of an engine that the run has started."""
        return next(url for url, name in self._reach.plan.engine_names.items() if name == role)

    def _name(self, url: str) -> str:
        """The role of an engine, or its address where the run did not start it."""
        return self._reach.plan.engine_names.get(url, url)

    def _peers(self, url: str) -> str:
        """What an engine is compared with: those of the same teacher, or all that generate."""
        teachers = self._reach.plan.teacher_urls
        if url in self._reach.plan.student_engines:
            return "students"
        return next((f"teacher {name}" for name, urls in teachers.items() if url in urls), "students")

    def _engines_beside(self, url: str) -> tuple[str, ...]:
        """The engines of the actor that drives this one."""
        plan = self._reach.plan
        kind = RoleKind.ROLLOUT if url in plan.student_engines else RoleKind.TEACHER
        driven = (plan.driven_by(role.name) for role in plan.of_kind(kind))
        return next((urls for urls in driven if url in urls), ())
