"""Start, watch and stop the processes of a run on several hosts: as a `Supervisor` does on one.

    Fleet -> Hosts -> Supervisor of the launcher's host
                   -> Agents -> the Supervisor of each other host

A host that is lost is the end of every process on it. A process is started again on its own host: once that is back,
or not at all. An agent that has come back may be another process, in another folder, on a machine that has lost its
mounts: before anything starts there it is asked again for what it was asked for when the hosts were gathered.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from opd_async.cluster.agents import Agents
from opd_async.cluster.nodes import HostLostError, Node
from opd_async.cluster.supervisor import MAX_UNREAD_EXITS, Exit, ProcessSpec, Supervisor, together
from opd_async.errors import DeadlineError, InputError, RoleError, StateError
from opd_async.keys import INCARNATION_ENV
from opd_async.transport import messages as m

HOST_LOST = -9
"""The code of a process whose host was lost: to the run it was killed."""


@dataclass(slots=True)
class _Far:
    """A process on another host."""

    node: Node
    incarnation: str
    started: bool = False
    """The agent has said that it exists."""
    asked: bool = False


class Hosts:
    """The processes of a run by name, wherever they are. Leaving the block kills those that still run.

    On cancel of a wait: what was asked of an agent goes on, and ends with the block.
    """

    def __init__(
        self,
        agents: Agents,
        local: Supervisor,
        *,
        where: Mapping[str, str],
        environment: Mapping[str, str],
        own_environment: Mapping[str, str],
        node_back_s: float,
        share: Callable[[Node], Awaitable[None]],
        echo: Callable[[str], None],
        on_unwritten: Callable[[int], None],
    ) -> None:
        """`where` has the host of each process, empty for the launcher's. `environment` is that of every process,
        `own_environment` that of those on the launcher's host. `share` sees that a host shares the launcher's
        files, and raises `InputError` where it does not (`hosting.share_files`)."""
        self.exits: asyncio.Queue[Exit] = asyncio.Queue(MAX_UNREAD_EXITS)
        local.exits = self.exits
        self.agents = agents
        self._where = dict(where)
        self._environment = dict(environment)
        self._own = dict(own_environment)
        self._node_back_s = node_back_s
        self._local = local
        self._share = share
        self._echo = echo
        self._on_unwritten = on_unwritten
        self._far: dict[str, _Far] = {}

    async def __aenter__(self) -> Self:
        await self._local.__aenter__()
        self.agents.on_end, self.agents.on_lines, self.agents.on_lost = self._ended, self._lines, self._lost
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.stop_all((), at_once=True)
        finally:
            await self._local.__aexit__(kind, error, trace)

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the processes that are there, on any host."""
        return (*self._local.running, *self._far)

    def place(self, name: str, host: str) -> None:
        """Note the host of a process that was not in the plan, or was elsewhere and has ended."""
        self._where[name] = host

    def lost(self, name: str) -> bool:
        """Whether the host of this process is lost now."""
        node = self._node(name)
        return node is not None and not node.there.is_set()

    def _node(self, name: str) -> Node | None:
        """The host of a process; None for the launcher's."""
        where = self._where.get(name, "")
        return self.agents.nodes[where] if where else None

    async def start(self, spec: ProcessSpec) -> None:
        """Start a process on its host, for which a lost one has `node_back_s` to come back.

        Raises `RoleError` if it cannot be started, `HostLostError` if the host stays away, `StateError` if it runs
        already. On cancel: it may have been started, and ends with the block.
        """
        node = self._node(spec.name)
        if node is None:
            env = {**self._own, **self._environment, **spec.env}
            await self._local.start(ProcessSpec(spec.name, spec.command, env, spec.log_path, spec.secrets))
            return
        if spec.name in self._far:
            raise StateError(f"{spec.name} is running already")
        while True:
            await self._ready(node, spec.name)
            far = self._far[spec.name] = _Far(node, spec.env.get(INCARNATION_ENV, ""))
            try:
                await self.agents.ask(node, self._request(spec))
                far.started = True
                return
            except HostLostError:  # its end is no end of a process that has run: wait for the host again
                self._forget(spec.name, far)
            except BaseException:
                self._forget(spec.name, far)
                raise

    async def _ready(self, node: Node, name: str) -> None:
        """Wait for a host that is lost, until it can be used too."""
        give_up = None
        while not node.there.is_set() or not await self._fit(node):
            if give_up is None:
                give_up = time.monotonic() + self._node_back_s
                self._echo(f"{name} waits for {node.name} to come back, for at most {self._node_back_s:.0f} s")
            try:
                async with asyncio.timeout(give_up - time.monotonic()):
                    await node.there.wait()
            except TimeoutError:
                raise HostLostError(
                    f"{node.name} has not come back in {self._node_back_s:.0f} s (cluster.node_back_s), and {name} was "
                    f"there ({node.lost_for}); mend the host and start its agent, then go on with --resume"
                ) from None

    async def _fit(self, node: Node) -> bool:
        """Whether a host shares the launcher's files, seen once for each agent of it; one that does not is given up."""
        async with node.looked_at:  # its processes start at the same time
            incarnation = node.incarnation
            if node.shared != incarnation:
                try:
                    await self._share(node)
                except InputError as problem:
                    if node.there.is_set() and node.incarnation == incarnation:
                        await self.agents.put_off(node, str(problem))
                    return False
        return node.there.is_set()

    def _request(self, spec: ProcessSpec) -> Callable[[int], m.Message]:
        own = spec.command[0] == sys.executable
        return lambda number: m.StartProcess(
            request=number,
            role=spec.name,
            incarnation=spec.env.get(INCARNATION_ENV, ""),
            words=list(spec.command),
            own_python=own,
            env={**self._environment, **spec.env},
            log=str(spec.log_path),
            secrets=list(spec.secrets),
        )

    async def stop(self, name: str, at_once: bool = False) -> Exit | None:
        """Stop a process in order and wait for its end; None if it is not there. A lost host has ended it already."""
        far = self._far.get(name)
        if far is None:
            return await self._local.stop(name, at_once)
        far.asked = True
        deadline_s = self.agents.stop_seconds
        try:
            answer = await self.agents.ask(far.node, lambda number: m.StopProcess(number, name, at_once), deadline_s)
        except HostLostError:
            return Exit(name, HOST_LOST, (f"its host {far.node.name} was lost",))
        except RoleError as error:
            raise DeadlineError(str(error)) from None
        finally:
            self._forget(name, far)
        if not answer.numbers:
            return None
        killed_by, code = answer.numbers
        return Exit(name, -killed_by if killed_by else code, ())

    async def stop_all(self, order: Sequence[Sequence[str]], at_once: bool = False) -> None:
        """Stop the processes, one group of `order` after the other, then those that it does not name; `at_once`: kill
        all of them."""
        if at_once:
            async with asyncio.TaskGroup() as stops:
                stops.create_task(self._local.stop_all((), at_once=True))
                for name in tuple(self._far):
                    stops.create_task(self.stop(name, at_once=True), name=f"stop {name}")
        for group in order:
            await together(self.stop, group)
        await together(self.stop, self.running)

    def kill(self, name: str) -> None:
        """Kill a process as a crash would: its end arrives in `exits`. `RoleError` if it is not there."""
        far = self._far.get(name)
        if far is None:
            self._local.kill(name)
        else:
            self.agents.tell(far.node, m.KillProcess(name))

    def _ended(self, node: Node, ended: m.ProcessEnded) -> None:
        far = self._far.get(ended.role)
        if far is None or far.incarnation != ended.incarnation:
            return
        code = -ended.killed_by if ended.killed_by else ended.exit_code
        self._report(far, Exit(ended.role, code, tuple(ended.lines)))

    def _lost(self, node: Node) -> None:
        for name, far in [(name, far) for name, far in self._far.items() if far.node is node]:
            if far.started:
                self._report(far, Exit(name, HOST_LOST, (f"its host {node.name} was lost",)))
            else:  # whoever is starting it is told, and waits for the host
                self._forget(name, far)

    def _report(self, far: _Far, end: Exit) -> None:
        self._forget(end.name, far)
        if not far.asked:
            self.agents.spawn(self.exits.put(end), f"end of {end.name}")

    def _forget(self, name: str, far: _Far) -> None:
        if self._far.get(name) is far:
            del self._far[name]

    def _lines(self, lines: m.Lines) -> None:
        for line in lines.lines:
            self._echo(line)
        if lines.lost:
            self._on_unwritten(lines.lost)
