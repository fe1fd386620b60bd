"""Find what hangs: processes are listened to, engines are asked, and what gives no sign of life is killed.

who                            sign of life                         what proves that the work goes on
actors, intake                 a heartbeat of their event loop      the same loop does the work
a learner rank                 a beat of a thread (`RankBeat`)      the time of its command against the last ones
an embedded engine             an answer to `/model_info`           the time of its model's present step
an SGLang server               an answer to `/health_generate`      the same: its scheduler gives it

loop           waits for                         unblocked by
watch          the silence of a process          the clock
engine (each)  the next look at an engine        the clock; its answer

A kill is seen by `Deaths`, which handles it as any other end. Engines that the run did not start are named, not killed.
An engine that is paused, or that names other weights than the run has sent, was changed by somebody: a teacher that
the run started is replaced, a paused one goes on, a student is sent the weights again and proven (`RESYNC`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection, Coroutine, Sequence
from typing import Any, Protocol

import aiohttp

from opd_async.cluster.fleet import Fleet
from opd_async.engines.pulse import Pulse, go_on, says_yes, stands_still, take_pulse
from opd_async.plan.plan import Plan, RoleKind
from opd_async.run.barrier import Barrier, BarrierState
from opd_async.run.state import RESYNC, UPDATE, RunState
from opd_async.scheduling.liveness import Liveness, Work
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport import messages as m
from opd_async.transport.mailbox import Mailbox

log = logging.getLogger(__name__)

WATCH_S = 1.0
LOOK_S = 5.0
"""Seconds between two looks at an engine, or a sixth of `heartbeat_deadline_s` where that is less."""
HEALTH_S = 25.0
"""SGLang's `/health_generate` gives up after 20 s; or half of `heartbeat_deadline_s` where that is less."""


class Reach(Protocol):
    """What the watch needs of the dispatcher."""

    plan: Plan
    fleet: Fleet
    metrics: RoleMetrics
    mailbox: Mailbox
    state: RunState
    barrier: Barrier

    async def broadcast(self, kind: RoleKind, message: m.Message) -> list[str]:
        """Send to every connected role of a kind; returns whom it reached."""

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run in the background until the run ends."""


class Watch:
    """Listens, looks and kills."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._settings = reach.plan.topology.supervisor
        self._live = Liveness(self._settings.heartbeat_deadline_s, self._settings.step_deadline_s)
        self._learner = reach.plan.learner_of(0)
        self.grow()
        self._named: set[str] = set()
        """Processes that are not ours to kill, and were reported."""
        self._odd: dict[str, str] = {}
        """What was strange of an engine at the last look."""

    def grow(self) -> None:
        """Know the learner's ranks of the plan as it is now."""
        plan = self._reach.plan
        # the role, on one of the learner's hosts, of each rank
        self._ranks = {f"rank-{rank}": plan.learner_of(rank) for rank in range(plan.topology.learner.ranks)}

    # --- signs of life -----------------------------------------------------------------------------------------------

    def heard(self, role: str) -> None:
        """Note that a role has said something just now."""
        if role != self._learner:  # its ranks beat each for itself, and it speaks only when it has something to say
            self._live.spoke(role, time.monotonic())

    def beat(self, rank: str, beat: m.RankBeat) -> None:
        """Note what a learner rank is doing."""
        work = Work(beat.doing, beat.for_s, beat.usual_s, beat.still_s) if beat.doing else None
        self._live.heard(rank, time.monotonic(), work)

    def started(self, role: str) -> None:
        """Expect a sign of a role that was started again, once it has had its time to come up."""
        self._live.heard(role, time.monotonic() + self._settings.start_deadline_s)

    def engines_answered(self, but: Collection[str] = ()) -> None:
        """Expect signs of every engine from now on `but` of these roles: each has answered, though perhaps not yet to
        this watch."""
        for url, role in self._engines.items():
            if role not in but:
                self._live.spoke(role or url, time.monotonic())

    def ended(self, role: str) -> None:
        """Expect no sign of a role that has ended."""
        self._live.forget(role)
        if role in self._ranks.values():  # the others cannot go on without its ranks
            for rank in self._ranks:
                self._live.forget(rank)

    def idle_s(self) -> float:
        """Seconds since a learner rank that is at work last got something done; infinite if none is at work."""
        working = self._live.working(time.monotonic()).items()
        return min((work.without_progress_s for name, work in working if name.startswith("rank-")), default=math.inf)

    def witness(self, who: str) -> str:
        """Say where to look when `who` was waited for in vain: what the roles are at, and the name of a log."""
        now = time.monotonic()
        logs = self._reach.fleet.log_folder()
        role = next((role.name for role in self._reach.plan.roles if role.name in who), None)
        working = {name: work for name, work in self._live.working(now).items() if name.startswith("rank-")}
        if role is None and working:
            rank, work = max(working.items(), key=lambda item: item[1].for_s)
            began = time.strftime("%H:%M:%S", time.localtime(time.time() - work.for_s))
            learner = self._ranks.get(rank, self._learner)
            return f"{learner} ({rank}) is at {work.command} since {began}; see {logs / learner}.log"
        if role is None:
            role = next(role.name for role in self._reach.plan.roles if role.kind is RoleKind.INTAKE)
            silent_s = self._live.silent_s(role, now)
            return (
                f"no learner rank is at work, so {role} has given it none (last heard {silent_s:.0f} s ago); "
                f"see {logs / role}.log"
            )
        return f"{role} was last heard {self._live.silent_s(role, now):.0f} s ago; see {logs / role}.log"

    # --- loops -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Kill what hangs; `Deaths` then sees it end. On cancel: nothing is killed any more."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            # while this process stood still (a stopped job, a machine that slept) nobody could be heard
            self._live.absent(max(now - looked - 2 * WATCH_S, 0.0))
            looked = now
            for who, problem in self._live.hanging(now).items():
                self._hangs(who, problem)

    def unanswered(self, role: str, problem: str) -> None:
        """Kill a role that beats but does not answer what it was asked."""
        self._hangs(role, problem)

    async def end_stuck_engines(self, urls: Sequence[str]) -> None:
        """Kill each of these engines that a failed weight update has left standing still; name those of others.

        NCCL tells nobody that a member of a group has died: the others wait in its broadcast for half an hour, while
        their HTTP side answers as ever. On cancel: some have been killed.
        """
        wait_s = min(HEALTH_S, self._settings.heartbeat_deadline_s / 2)
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            asked = {
                url: group.create_task(stands_still(session, url, self._reach.plan.section(url).api_key, wait_s))
                for url in urls
            }
        for url, question in asked.items():
            if question.result():
                self._hangs(self._engines.get(url) or url, f"no answer in {wait_s:g} s after a failed weight update")

    def _hangs(self, who: str, problem: str) -> None:
        role = self._ranks.get(who, who)
        if role in self._reach.fleet.supervisor.running:
            self.ended(role)
            self._reach.fleet.say(
                f"{role} hangs{f' ({who})' if who != role else ''}: {problem}; killing it, "
                f"see {self._reach.fleet.log_folder() / role}.log"
            )
            self._reach.metrics["opd_launcher_hangs_total"].labels(role).inc()
            self._reach.fleet.supervisor.kill(role)
        elif who in self._engines_of_others and who not in self._named:
            self._named.add(who)
            self._reach.metrics["opd_launcher_hangs_total"].labels(who).inc()
            self._reach.fleet.say(f"{who}: {problem}; the run did not start it, so whoever did must restart it")

    # --- engines -----------------------------------------------------------------------------------------------------

    @property
    def _engines_of_others(self) -> set[str]:
        return {url for url, role in self._engines.items() if role is None}

    @property
    def _engines(self) -> dict[str, str | None]:
        """Every engine's address, and its role where the run starts it."""
        plan = self._reach.plan
        found: dict[str, str | None] = dict.fromkeys((*plan.student_engines, *plan.teacher_engines))
        for role in plan.roles:
            if role.kind in (RoleKind.STUDENT_ENGINE, RoleKind.TEACHER_ENGINE):
                found[f"http://{role.host}:{role.ports['http']}"] = role.name
        return found

    def look_after_engines(self, only: Collection[str] | None = None) -> None:
        """Begin to look at every engine, or at these roles only, in tasks of the dispatcher."""
        for url, role in self._engines.items():
            if only is not None and role not in only:
                continue
            self._reach.spawn(self._look_at(url, role or url), f"watch-{role or url}")

    async def _look_at(self, url: str, who: str) -> None:
        """Look at one engine again and again. On cancel: nothing has changed."""
        every_s = min(LOOK_S, self._settings.heartbeat_deadline_s / 6)
        section, first = self._reach.plan.section(url), None
        async with aiohttp.ClientSession() as session:
            while True:
                await asyncio.sleep(every_s)
                before = self._weights()
                pulse = await take_pulse(session, url, section.api_key, every_s)
                if pulse is None:  # it may not be up yet: what never answered is the business of those who start it
                    continue
                runs = url not in self._reach.plan.student_engines or before is not None
                if pulse.paused is None and runs and not await self._scheduler_lives(session, url, who):
                    continue
                self._named.discard(who)
                self._live.heard(who, time.monotonic(), pulse.work)
                if url in self._reach.plan.student_engines:
                    self._look_at_student(who, pulse, before)
                else:
                    first = first or pulse
                    admin = section.admin_api_key or section.api_key
                    await self._look_at_teacher(session, url, who, pulse, first, admin)

    async def _scheduler_lives(self, session: aiohttp.ClientSession, url: str, who: str) -> bool:
        """Ask an engine that says nothing of itself whether what is behind its HTTP side works; have it go on if not.

        To go on harms nobody: a run ends the requests of such student engines, and pauses none of them.
        """
        section, settings = self._reach.plan.section(url), self._settings
        wait_s = min(LOOK_S, settings.heartbeat_deadline_s / 6)
        if await says_yes(session, url, "/ready", section.api_key, wait_s) is False:
            await go_on(session, url, section.admin_api_key or section.api_key, wait_s)
            if await says_yes(session, url, "/ready", section.api_key, wait_s):
                self._was_paused(who, True)
        health_s = min(HEALTH_S, settings.heartbeat_deadline_s / 2)
        return await says_yes(session, url, "/health_generate", section.api_key, health_s) is not False

    def _was_paused(self, who: str, goes: bool) -> None:
        self._reach.metrics["opd_launcher_foreign_weights_total"].labels(who).inc()
        if goes:
            self._reach.fleet.say(f"{who} was paused by somebody: it goes on")
        else:
            self._reach.fleet.say(f"{who} was paused by somebody, and does not obey /continue_generation")

    def _weights(self) -> int | None:
        """The version that every student engine should have now; None while that may change. Engines that score too
        have it also while generation stands."""
        barrier, version = self._reach.barrier, self._reach.state.version
        scores = self._reach.plan.topology.opd.on_student_engines
        named = not barrier.scores_stopped if scores else barrier.state is BarrierState.OPEN
        return version if named and version >= 0 else None

    def _look_at_student(self, who: str, pulse: Pulse, before: int | None) -> None:
        """Have the weights sent again to an engine that twice in a row names others, or is paused."""
        odd = ""
        if before is not None and before == self._weights():
            if pulse.weight_version != str(before):
                odd = f"names weights {pulse.weight_version!r:.40} where the learner sent {before}"
            elif pulse.paused:
                odd = "is paused, though nobody of this run has paused it"
        again = odd and self._odd.get(who) == odd
        self._odd[who] = odd
        if again:
            self._odd[who] = ""
            self._reach.metrics["opd_launcher_foreign_weights_total"].labels(who).inc()
            self._reach.fleet.say(f"{who} {odd}: sending the weights again")
            self._reach.state.engine_group += 1
            self._reach.mailbox.deliver(UPDATE, RESYNC)

    async def _look_at_teacher(
        self, session: aiohttp.ClientSession, url: str, who: str, pulse: Pulse, first: Pulse, admin: str | None
    ) -> None:
        """Continue a teacher that is paused; replace one whose weights were replaced, if the run has started it."""
        if pulse.paused:
            self._was_paused(who, await go_on(session, url, admin, LOOK_S))
        change = (pulse.weight_version, pulse.model_path) != (first.weight_version, first.model_path)
        if change and who in self._reach.fleet.supervisor.running:
            self._live.forget(who)
            text = f"it names weights {pulse.weight_version!r:.40} of {pulse.model_path:.200}"
            await self._reach.broadcast(RoleKind.TEACHER, m.EngineChanged(url, text))
            self._reach.metrics["opd_launcher_foreign_weights_total"].labels(who).inc()
            self._reach.fleet.say(
                f"{who} names weights {pulse.weight_version!r:.40} of {pulse.model_path:.200}, where "
                f"it began with {first.weight_version!r:.40} of {first.model_path:.200}: killing it"
            )
            self._reach.fleet.supervisor.kill(who)
