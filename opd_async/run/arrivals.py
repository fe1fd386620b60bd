"""Everybody who has to come up before a run goes on, waited for at the same time, and named as they come.

    start, or back to a checkpoint    every role and engine         -> weight update
    a weight update has failed        the student engines it is for -> the next try

Whose host is lost is not waited for where others do its work: `opd_async.run.deaths` brings it in later. Where nobody
does, time stands until the host is back, for which `deaths` gives it `cluster.node_back_s` before it ends the run.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

from opd_async.cluster.fleet import Standing
from opd_async.errors import DeadlineError
from opd_async.plan.plan import RoleKind
from opd_async.run.dispatcher import Dispatcher

INTAKE = "the intake"
NAMED = 3
"""So many of those still waited for are named; the others are counted."""
LOOK_S = 1.0
"""Seconds between two looks at whose host is lost."""


class Expected(NamedTuple):
    """Somebody who has to come up."""

    role: str
    """Its name; the URL of an engine that the run does not start."""
    up: Coroutine[Any, Any, Any]
    """Returns once it is."""


class Arrivals:
    """Waits for the roles and engines of one run."""

    def __init__(self, dispatcher: Dispatcher, say: Callable[[str], None]) -> None:
        self._dispatcher = dispatcher
        self._say = say

    async def everybody(self) -> dict[str, Any]:
        """Wait for every role, the learner with the student loaded, and every engine; returns what each has said, by
        who was waited for. Raises and on cancel: as `all_up`."""
        plan = self._dispatcher.plan
        engines = self._engines(RoleKind.STUDENT_ENGINE, plan.student_engines)
        own = [url for url in plan.teacher_engines if url not in plan.student_engines]
        engines |= self._engines(RoleKind.TEACHER_ENGINE, own)
        return await self._all_up(self._roles() | engines)

    async def students(self, urls: Sequence[str]) -> None:
        """Wait for these student engines, but for those that need no weights any more. Raises and on cancel: as
        `all_up`."""
        await self._all_up(self._engines(RoleKind.STUDENT_ENGINE, urls))

    async def _all_up(self, expected: Mapping[str, Expected]) -> dict[str, Any]:
        topology, fleet = self._dispatcher.plan.topology, self._dispatcher.fleet
        deadline_s = topology.supervisor.start_deadline_s
        if not topology.on_one_host:  # before that a host is not known to be lost
            deadline_s += topology.cluster.lost_s
        return await all_up(expected, deadline_s, self._say, fleet.standing)

    def _roles(self) -> dict[str, Expected]:
        """Every role that is not an engine: the intake with its frontier, the learner's first rank for all of them, and
        those of the others that are not connected."""
        dispatcher, plan = self._dispatcher, self._dispatcher.plan
        first = plan.of_kind(RoleKind.INTAKE)[0].name
        expected = {INTAKE: Expected(first, dispatcher.mailbox.expect("Frontier", math.inf, INTAKE))}
        learner = dispatcher.name_of(RoleKind.LEARNER)
        expected |= {role.name: self._hello(role.name) for role in plan.of_kind(RoleKind.INTAKE)[1:]}
        expected["the learner to load the student"] = self._hello(learner)
        for kind in (RoleKind.ROLLOUT, RoleKind.TEACHER):
            up, names = dispatcher.up(kind), [role.name for role in plan.of_kind(kind)]
            expected |= {name: self._hello(name) for name in names if name not in up and self._counts(name)}
        return expected

    def _hello(self, role: str) -> Expected:
        return Expected(role, self._dispatcher.mailbox.expect(("Hello", role), math.inf, role))

    def _engines(self, kind: RoleKind, urls: Sequence[str]) -> dict[str, Expected]:
        fleet, names = self._dispatcher.fleet, self._dispatcher.plan.engine_names
        return {
            f"the {kind.value.replace('_', ' ')} at {url}": Expected(
                names[url], fleet.wait_for_engine(kind, url, math.inf)
            )
            for url in urls
            if self._counts(names[url])
        }

    def _counts(self, role: str) -> bool:
        return self._dispatcher.fleet.standing(role) is not Standing.SPARED


async def all_up(
    expected: Mapping[str, Expected],
    deadline_s: float,
    say: Callable[[str], None],
    standing: Callable[[str], Standing] = lambda role: Standing.EXPECTED,
) -> dict[str, Any]:
    """Return what each of those that are `expected` has to say, by who is waited for, once all are up; without those
    that are spared meanwhile. `standing` is of a role.

    Raises `DeadlineError` that names who is missing when nobody has come for `deadline_s`, and what a wait raises. The
    deadline begins anew with each arrival: a slow machine brings up one after the other. It also does while
    somebody is held up by a lost host. On cancel: the waits are cancelled too.
    """
    loop, spared = asyncio.get_running_loop(), set[asyncio.Task[Any]]()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {group.create_task(wanted.up, name=who): wanted.role for who, wanted in expected.items()}
            pending, give_up = set(tasks), loop.time() + deadline_s
            say(f"waiting for {listed(list(expected))}")
            while pending:
                wait_s = min(max(give_up - loop.time(), 0.0), LOOK_S)
                done, pending = await asyncio.wait(pending, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                standings = {task: standing(tasks[task]) for task in pending}
                leaving = {task for task in pending if standings[task] is Standing.SPARED}
                spared, pending = spared | leaving, pending - leaving
                missing = _names(tasks, pending)
                if done or leaving or Standing.HELD_UP in standings.values():
                    give_up = loop.time() + deadline_s
                elif loop.time() >= give_up:
                    raise DeadlineError(
                        f"timed out after {deadline_s:.0f} s waiting for {missing}; see the logs in the run's folder"
                    )
                for task in leaving:
                    task.cancel()
                if leaving:
                    say(f"going on without {_names(tasks, leaving)}, whose host is lost")
                if done and pending:
                    say(f"{_names(tasks, done)}: there; waiting for {missing}")
            return {task.get_name(): task.result() for task in tasks if task not in spared}
    except ExceptionGroup as group_error:  # one reason is enough, and a caller expects it as it is
        raise group_error.exceptions[0] from None


def _names(tasks: Mapping[asyncio.Task[Any], str], some: set[asyncio.Task[Any]]) -> str:
    return listed([task.get_name() for task in tasks if task in some])


def listed(names: list[str]) -> str:
    """`a, b, c and 5 more`."""
    more = len(names) - NAMED
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:NAMED])} and {more} more"
