"""The processes of a run: started from the plan, restarted within a budget, stopped in a written order.

stop order   rollout actors, teacher actors, learner, intake, student engines, teacher engines
             (first those that make work, then those that do it, then those that both need)
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from pathlib import Path

from opd_async.cluster.supervisor import Exit, ProcessSpec, Supervising
from opd_async.config.topology import EngineKind, EngineSection
from opd_async.engines.info import engine_problem
from opd_async.engines.probe import wait_until_ready
from opd_async.engines.sglang import keys_yaml
from opd_async.errors import InputError, RoleError
from opd_async.files import PRIVATE, storing, write_atomically
from opd_async.keys import INCARNATION_ENV, RunKeys, engine_environment, new_incarnation
from opd_async.plan.plan import Plan, RoleKind, RolePlan
from opd_async.plan.resolve import KEYS_FOLDER
from opd_async.scheduling.restarts import RestartBudget

STOP_ORDER = (
    RoleKind.ROLLOUT,
    RoleKind.TEACHER,
    RoleKind.LEARNER,
    RoleKind.INTAKE,
    RoleKind.STUDENT_ENGINE,
    RoleKind.TEACHER_ENGINE,
)


class Standing(Enum):
    """What a role is to those who wait for it."""

    EXPECTED = auto()
    """It comes up, or has died and is started again."""
    HELD_UP = auto()
    """Its host is lost, and nobody else does its work."""
    SPARED = auto()
    """The run goes on without it for now."""


class Fleet:
    """Starts and stops roles by name; knows which engines answer."""

    def __init__(self, plan: Plan, supervisor: Supervising, echo: Callable[[str], None], keys: RunKeys) -> None:
        """`plan` has the keys already (`Plan.with_keys`)."""
        self.plan = plan
        self.supervisor = supervisor
        self.say = echo
        self.keys = keys
        self._incarnations: dict[str, str] = {}
        settings = plan.topology.supervisor
        self._budget = RestartBudget(settings.restarts, settings.restart_window_s, settings.backoff_s, time.monotonic)
        self._roles: dict[str, RolePlan] = {}
        self.grow(plan)
        self._logs = plan.run_folder / "logs"
        self.away: set[str] = set()
        """Roles that the run goes on without for now: their host was drained or stays away, or they are coming up."""
        self.left: set[str] = set()
        """Those of them that were ended for good: nobody but who brings their host up starts them again."""

    @property
    def restarts(self) -> dict[str, int]:
        """Restarts so far by role; a role that never died is absent."""
        return self._budget.used

    def grow(self, plan: Plan) -> None:
        """Take over a plan that has more roles, or another learner; ends of those that it had are still known."""
        self.plan = plan
        self._roles |= {role.name: role for role in plan.roles}
        self._ranks = {f"rank-{rank}": plan.learner_of(rank) for rank in range(plan.topology.learner.ranks)}

    def role(self, name: str) -> RolePlan:
        """The plan of a role, by its name; KeyError for a name that no plan of the run had."""
        return self._roles[name]

    async def start(self, name: str, env: dict[str, str] | None = None) -> None:
        """Start the role's process with its threads, its environment and `env`. On cancel: nothing is started."""
        role = self._roles[name]
        threads = self._threads(role)
        self._incarnations[name] = new_incarnation()
        settings = {"OMP_NUM_THREADS": str(threads), **role.env, **self._key_variables(role), **(env or {})}
        settings[INCARNATION_ENV] = self._incarnations[name]
        log = self._logs / f"{name}.log"
        await self.supervisor.start(ProcessSpec(name, role.command, settings, log, self._secrets()))

    def incarnation(self, name: str) -> str | None:
        """Which start of a role, or of the learner whose rank it is, is the current one; None if it never started."""
        return self._incarnations.get(self._ranks.get(name, name))

    def standing(self, name: str) -> Standing:
        """Whether to wait for a role now; an engine that the run does not start, by its URL, is always expected.

        Student engines and rollout actors of lost hosts are spared, as long as there are others. A teacher's prompts
        are dealt to all of its actors and engines, and those of one that is lost would wait.
        """
        if name in self.away:
            return Standing.SPARED
        if name not in self._roles or not self.supervisor.lost(name):
            return Standing.EXPECTED
        kind = self._roles[name].kind
        if kind not in (RoleKind.STUDENT_ENGINE, RoleKind.ROLLOUT):
            return Standing.HELD_UP
        others = {role.name for role in self.plan.of_kind(kind)} - self.away
        return Standing.HELD_UP if all(map(self.supervisor.lost, others)) else Standing.SPARED

    def students_to_reach(self) -> list[str]:
        """The student engines without those that are away, and of lost hosts; those too where every host is lost."""
        names = self.plan.engine_names
        return [url for url in self.plan.student_engines if self.standing(names[url]) is not Standing.SPARED]

    def urls_away(self) -> set[str]:
        """The base URLs of the engines that are away."""
        roles = (self._roles[name] for name in self.away)
        return {f"http://{role.host}:{role.ports['http']}" for role in roles if "http" in role.ports}

    def _engine(self, role: RolePlan) -> EngineSection | None:
        """The section of an engine; None for other roles."""
        if role.kind is RoleKind.STUDENT_ENGINE:
            return self.plan.topology.engines.student
        return self.plan.topology.teachers[role.teacher].engines if role.kind is RoleKind.TEACHER_ENGINE else None

    def _threads(self, role: RolePlan) -> int:
        engine = self._engine(role)
        if role.kind is RoleKind.LEARNER:
            return self.plan.topology.learner.threads
        return 1 if engine is None else engine.threads

    def _key_variables(self, role: RolePlan) -> dict[str, str]:
        """A role's keys as environment variables: an engine has its own, every other role those of the run."""
        engine = self._engine(role)
        if engine is None:
            return self.keys.environment()
        if engine.kind is not EngineKind.SGLANG:
            return engine_environment(engine.api_key, engine.admin_api_key)
        folder = self.plan.run_folder / KEYS_FOLDER
        with storing(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            write_atomically(folder / f"{role.name}.yaml", keys_yaml(engine.api_key, engine.admin_api_key), PRIVATE)
        return {}

    def _secrets(self) -> tuple[str, ...]:
        """Every key of the run: what no log may show."""
        sections = (section for _, _, section in self.plan.topology.engine_sides)
        given = (key for section in sections for key in (section.api_key, section.admin_api_key))
        everything = {key for key in (*given, *self.keys.environment().values()) if key}
        return tuple(sorted(everything, key=len, reverse=True))  # none is cut by one that begins like it

    def forget_keys(self) -> None:
        """Remove the files that hold keys: nobody starts any more."""
        shutil.rmtree(self.plan.run_folder / KEYS_FOLDER, ignore_errors=True)

    async def start_all(self, env: dict[str, str] | None = None) -> None:
        """Start every role, each with `env` as in `start`; they wait for one another.

        Those of a host are started one after the other, all hosts at the same time. Raises an exception group of what
        `start` raises. On cancel: those that were started stay, until `stop_all`.
        """

        async def start_on(roles: Sequence[RolePlan]) -> None:
            for role in roles:
                await self.start(role.name, env)

        by_host: dict[str, list[RolePlan]] = {}
        for role in self.plan.roles:
            by_host.setdefault(role.node, []).append(role)
        async with asyncio.TaskGroup() as starts:
            for node, roles in by_host.items():
                starts.create_task(start_on(roles), name=f"start on {node or 'this host'}")

    async def await_restart(self, ended: Exit) -> None:
        """Spend one restart of the role and wait its backoff. Raises `RoleError` with its last lines when none is left.

        A role that refused what it was given would refuse it again: that is an `InputError` at once. On cancel: the
        restart is spent.
        """
        if ended.code == InputError.exit_code:
            raise InputError(
                f"{ended.name} ended ({ended.cause}) and would again: it cannot use what it was given. Its last "
                f"lines:\n{self._last_lines(ended)}"
            )
        delay = self._budget.next_delay(ended.name)
        if delay is None:
            settings = self.plan.topology.supervisor
            raise RoleError(
                f"{ended.name} ended ({ended.cause}) and its {settings.restarts} restarts in "
                f"{settings.restart_window_s:.0f} s are spent. Its last lines:\n"
                f"{self._last_lines(ended)}"
            )
        self.say(f"{ended.name} ended ({ended.cause}); restarting in {delay:.1f} s")
        await asyncio.sleep(delay)

    def _last_lines(self, ended: Exit) -> str:
        lines = "\n".join(f"  {ended.name} | {line}" for line in ended.tail[-12:])
        return f"{lines}\nRead {self._logs / f'{ended.name}.log'}; after mending the cause, go on with --resume"

    async def wait_for_engine(self, kind: RoleKind, url: str, deadline_s: float | None = None) -> None:
        """Return once the engine answers, for which it has `deadline_s`, or `supervisor.start_deadline_s`.

        Raises `DeadlineError`, or `RoleError` if a run cannot use what answers. On cancel: nothing has changed.
        """
        section, name = self.plan.section(url), f"the {kind.value.replace('_', ' ')}"
        deadline_s = self.plan.topology.supervisor.start_deadline_s if deadline_s is None else deadline_s
        await wait_until_ready(url, name, deadline_s, section.api_key)
        if problem := await engine_problem(url, section):
            raise RoleError(f"{name} at {url} {problem}")

    async def stop_all(self, at_once: bool = False) -> None:
        """Stop every role, one kind of `STOP_ORDER` after the other; `at_once`: kill them.

        On cancel: some may run, until the supervisor ends.
        """
        order = [[role.name for role in self.plan.of_kind(kind)] for kind in STOP_ORDER]
        await self.supervisor.stop_all(order, at_once=at_once)

    def log_folder(self) -> Path:
        """The folder with one log for each role, `NAME.log`."""
        return self._logs
