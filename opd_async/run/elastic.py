"""Hosts that join a run while it goes on, and hosts that leave it in order.

    an agent joins    folder shared, ports found -> a seat of the plan is taken -> engines start -> weight update
                      -> rollout actor starts -> leases
    opd drain HOST    weight update: generation stands -> actors end, their leases go back behind what the intake holds
                      -> engines leave the weight group -> the agent is let go
    opd drain --undo  an agent that is started on a host that has left is let in again
    an agent of such a host, or of one that the run goes on without, joins    as above, on its old place
    one of a host that had nothing but ranks of the learner joins             it stands idle (`learner_hosts.py`)

Both are what happens at a host's loss and return, at a moment of the run's own choosing: whatever token was made is
held by the intake or made again under another attempt, and none is trained twice.

loop      waits for                                         unblocked by
welcome   an agent's answers, engines, a weight update      the agent, engines, the script; or the loss of the host
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from opd_async.cluster.hosting import share_files
from opd_async.cluster.hosts import Hosts
from opd_async.cluster.nodes import Node
from opd_async.errors import DeadlineError, InputError, OpdError, RoleError
from opd_async.plan.plan import Plan, RoleKind, RolePlan
from opd_async.plan.resolve import ports_asked_of_seat, ports_of_seat, with_seat
from opd_async.run.dispatcher import Dispatcher
from opd_async.run.leaving import answer, forget_requests, problem_of, requests, take_requests
from opd_async.run.run_folder import change_plan
from opd_async.run.state import RESYNC, UPDATE
from opd_async.transport import messages as m


class Elastic:
    """Grows and shrinks one run on several hosts."""

    def __init__(self, dispatcher: Dispatcher, hosts: Hosts, on_plan: Callable[[Plan], None]) -> None:
        """`on_plan` is told of each plan that has more roles than the one before."""
        self._dispatcher = dispatcher
        self._hosts = hosts
        self._agents = hosts.agents
        self._on_plan = on_plan
        self._begun = dispatcher.plan.topology
        self._taken = 0
        """Seats, in their order."""
        self._one_at_a_time = asyncio.Lock()
        self._awaited: dict[str, asyncio.Event] = {}
        """Engines that wait for the weights, by URL."""
        self._welcomes: set[str] = set()
        """Hosts that are being brought up."""

    def begin(self) -> None:
        """Take hosts, and requests, from now on. Raises `StorageError`."""
        take_requests(self._dispatcher.plan.run_folder)
        self._agents.on_here = self._here
        self._dispatcher.before_update = self.let_go
        self._dispatcher.on_updated = self._updated

    def end(self) -> None:
        """Take no more hosts, and no requests: the run is over."""
        self._agents.on_here = None
        forget_requests(self._dispatcher.plan.run_folder)

    # --- joining -----------------------------------------------------------------------------------------------------

    def _here(self, node: Node) -> None:
        if node.name not in self._welcomes:
            self._welcomes.add(node.name)
            self._dispatcher.spawn(self._welcome(node), f"welcome {node.name}")

    async def _welcome(self, node: Node) -> None:
        """Have a host take part that is new, or that the run goes on without. On cancel: what has started, stays."""
        fleet = self._dispatcher.fleet
        try:
            async with self._one_at_a_time:
                mine = self._roles_of(node)
                if not mine and self._agents.is_planned(node):
                    await share_files(self._dispatcher.plan.topology, self._agents, [node], fleet.say)
                    fleet.say(f"{node.name} is idle: the learner takes it when it next goes back to a checkpoint")
                    return
                starting, running = self._dispatcher.deaths.starting, fleet.supervisor.running
                back = [role for role in mine if role.name in fleet.away and role.name not in (*starting, *running)]
                if back or not mine:
                    await share_files(self._dispatcher.plan.topology, self._agents, [node], fleet.say)
                    await self._bring_up(node, back or await self._seat(node))
        except OpdError as error:
            if isinstance(error, InputError) and node.there.is_set():  # a host that is lost may be fit once it is back
                fleet.say(f"{node.name} cannot join: {error}")
                forget = not self._roles_of(node) and not self._agents.is_planned(node)
                await self._agents.dismiss(node, str(error), failed=True, forget=forget)
            else:
                fleet.say(f"going on without {node.name}: {error}")
                await self._withdraw(node)
        finally:
            self._welcomes.discard(node.name)

    def _roles_of(self, node: Node) -> list[RolePlan]:
        return [role for role in self._dispatcher.plan.roles if role.node == node.name]

    async def _seat(self, node: Node) -> list[RolePlan]:
        """Give a new host the next seat: its roles, which everybody who starts from now on finds in the plan.

        Raises `InputError` when the host cannot serve the run.
        """
        dispatcher, asked = self._dispatcher, ports_asked_of_seat(self._begun, self._taken)
        wanted = 0 if asked else ports_of_seat(self._begun)
        try:
            found = await self._agents.ask(node, lambda number: m.FindPorts(number, wanted, asked))
        except RoleError as error:
            raise InputError(str(error)) from None

        def seated(plan: Plan) -> Plan:
            return with_seat(plan, self._taken, node.name, node.address, asked or found.numbers)

        plan = change_plan(dispatcher.plan, seated)  # which may have another learner than when the agent was asked
        self._taken += 1
        dispatcher.grow(plan)
        for role in self._roles_of(node):
            self._hosts.place(role.name, node.name)
            dispatcher.fleet.away.add(role.name)
        self._on_plan(plan)
        return self._roles_of(node)

    async def _bring_up(self, node: Node, roles: Sequence[RolePlan]) -> None:
        """Start engines, have them get the weights, then start the actors that drive them."""
        dispatcher, fleet = self._dispatcher, self._dispatcher.fleet
        names = [role.name for role in roles]
        fleet.say(f"{node.name} joins: starting {', '.join(names)}")
        engines = [role for role in roles if role.kind is RoleKind.STUDENT_ENGINE]
        actors = [role for role in roles if role.kind is RoleKind.ROLLOUT]
        fleet.left.difference_update(names)
        for engine in engines:
            await fleet.start(engine.name)
        urls = [f"http://{engine.host}:{engine.ports['http']}" for engine in engines]
        for engine, url in zip(engines, urls, strict=True):
            await fleet.wait_for_engine(RoleKind.STUDENT_ENGINE, url)
            dispatcher.watch.heard(engine.name)
            await dispatcher.slow_engines.restarted(engine.name)
        fleet.away.difference_update(engine.name for engine in engines)
        await self._get_weights(node, urls)
        for actor in actors:
            fleet.away.discard(actor.name)
            await fleet.start(actor.name)
            dispatcher.watch.started(actor.name)
        for actor in actors:
            await dispatcher.until_up(actor.name, dispatcher.plan.topology.supervisor.start_deadline_s)
        dispatcher.resize()
        fleet.say(f"{node.name} takes part with {', '.join(names)}")

    async def _get_weights(self, node: Node, urls: Sequence[str]) -> None:
        """Have the present weights sent to new engines, whose actor may only then ask them for anything."""
        dispatcher, deadline_s = self._dispatcher, self._dispatcher.plan.topology.supervisor.step_deadline_s
        got = {url: asyncio.Event() for url in urls}
        self._awaited |= got
        dispatcher.mailbox.deliver(UPDATE, RESYNC)
        try:
            async with asyncio.timeout(deadline_s):
                for event in got.values():
                    await event.wait()
        except TimeoutError:
            raise DeadlineError(f"its engines have got no weights in {deadline_s:.0f} s") from None
        finally:
            for url in urls:
                self._awaited.pop(url, None)

    def _updated(self, urls: Sequence[str]) -> None:
        for url in urls:
            if (event := self._awaited.get(url)) is not None:
                event.set()

    # --- leaving -----------------------------------------------------------------------------------------------------

    async def let_go(self) -> None:
        """Let hosts leave that were asked to, or be let in again; generation stands.

        On cancel: they may be gone, in order.
        """
        folder = self._dispatcher.plan.run_folder
        for request in await asyncio.to_thread(requests, folder):
            done, text = self._take_back(request.host) if request.undo else await self._drain(request.host)
            await asyncio.to_thread(answer, folder, request, done, text)

    def _take_back(self, host: str) -> tuple[bool, str]:
        """Let a host in again that has left: whether that could be, and in words."""
        node = self._agents.nodes.get(host)
        if node is None or not node.drained:
            return False, f"{host} was not drained in this launch"
        node.drained = False
        return True, f"{host} takes part again as soon as an agent is there"

    async def _drain(self, host: str) -> tuple[bool, str]:
        """Have a host leave, if it can: whether it has, and in words."""
        dispatcher = self._dispatcher
        up = [name for kind in (RoleKind.ROLLOUT, RoleKind.TEACHER) for name in dispatcher.up(kind)]
        there = [name for name, node in self._agents.nodes.items() if node.there.is_set()]
        problem = problem_of(dispatcher.plan, host, up, there)
        if problem is None and host in self._welcomes:
            problem = f"{host} is still joining; ask again once it takes part"
        if problem is not None:
            return False, problem
        return True, await self._leave(self._agents.nodes[host])

    async def _leave(self, node: Node) -> str:
        """Have a host leave; returns what there is to say of it."""
        hanging = await self._withdraw(node)
        node.drained = True
        await self._agents.dismiss(node, "this host was drained: it has left the run")
        names = [role.name for role in self._roles_of(node)]
        self._dispatcher.fleet.say(f"{node.name} has left the run, with {', '.join(names) or 'nothing on it'}")
        if hanging:
            return f"{node.name} has left the run, but {', '.join(hanging)} cannot be ended there; switch it off and on"
        return f"{node.name} has left the run; its agent has ended"

    async def _withdraw(self, node: Node) -> list[str]:
        """End the processes of a host for good, also those that are being started again, all of a kind together;
        returns the names of those that nothing ends.

        On cancel: some of them may have ended.
        """
        dispatcher, fleet = self._dispatcher, self._dispatcher.fleet
        mine = self._roles_of(node)
        names = [role.name for role in mine]
        fleet.away.update(names)
        fleet.left.update(names)
        ends: dict[str, asyncio.Task[bool]] = {}
        for kind in (RoleKind.ROLLOUT, RoleKind.STUDENT_ENGINE):
            async with asyncio.TaskGroup() as group:
                for name in (role.name for role in mine if role.kind is kind):
                    ends[name] = group.create_task(self._end(name), name=f"end {name}")
        dispatcher.resize()
        return [name for name, end in ends.items() if not end.result()]

    async def _end(self, name: str) -> bool:
        """End a process for good; whether it has. One that hangs inside the kernel runs nothing more: it has been sent
        SIGKILL. On cancel: it may have ended."""
        dispatcher, ended = self._dispatcher, True
        await dispatcher.deaths.keep_down(name)
        try:
            await dispatcher.fleet.supervisor.stop(name)
        except DeadlineError as error:
            dispatcher.fleet.say(f"going on without {name}: {error}")
            ended = False
        await dispatcher.deaths.leave(name)
        return ended
