"""The agents of a run as the launcher sees them: who has joined, who is silent, and what they are asked.

agents <-> LauncherEnd <-> receive -> Node, answers -> on_end, on_lines, on_lost (`hosts.py`)

loop      waits for                          unblocked by
receive   a message of an agent              the agents
watch     the silence of a host              the clock
door      a peer that shows its key          an agent, a stranger
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import zmq.asyncio

from opd_async.cluster.interfaces import Face
from opd_async.cluster.lease import beat_seconds
from opd_async.cluster.line import LauncherEnd
from opd_async.cluster.nodes import HostLostError, Node, natural, unfit
from opd_async.config.clustering import ClusterSection
from opd_async.errors import DeadlineError, InputError, RoleError
from opd_async.keys import RunKeys
from opd_async.transport import messages as m

ASK_S = 60.0
"""An agent that beats, and leaves a request unanswered for so long, has lost it: its host is given up."""
SAY_EVERY_S = 10.0
EARLY_S = 5.0
"""After which a host asks again that has come before its time."""
DRAINED_S = 20.0
"""The same for one that was drained, which may have to wait for as long as the run takes."""
DRAINED = "this host was drained, and takes part again after `opd drain --undo`"
UNFIT_S = 10.0
"""The same for one that is back and cannot be used as it is: a file system may yet be mounted."""
BEATS_OF_PROOF = 3


class Agents:
    """Opened before the plan is made, closed when every process of the run has ended.

    On cancel: a wait is given up, and the agents stay as they are until the block is left.
    """

    def __init__(
        self,
        cluster: ClusterSection,
        stop_deadline_s: float,
        keys: RunKeys,
        face: Face,
        versions: Mapping[str, str],
        say: Callable[[str], None],
    ) -> None:
        self.nodes: dict[str, Node] = {}
        self.on_end: Callable[[Node, m.ProcessEnded], None] = lambda node, ended: None
        self.on_lines: Callable[[m.Lines], None] = lambda lines: None
        self.on_lost: Callable[[Node], None] = lambda node: None
        self.on_missed: Callable[[Node], None] = lambda node: None
        """Told after `on_lost`, for whoever can have another agent on that host."""
        self.on_here: Callable[[Node], None] | None = None
        """Told, once the run goes on, of a host that has joined or is back."""
        self._cluster = cluster
        self._stop_deadline_s = stop_deadline_s
        self._keys = keys
        self._face = face
        self._versions = dict(versions)
        self._say = say
        self.stop_seconds = stop_deadline_s + ASK_S
        """How long the end of a process may take on a host that is there."""
        self._by_route: dict[bytes, Node] = {}
        self._open_to_all = True
        self._regular: set[str] = set()
        """The hosts of the plan, once they are gathered."""
        self._claims: dict[tuple[str, str], float] = {}
        """When an agent first asked for a name that another one has."""
        self._requests = itertools.count(1)
        self._answers: dict[int, tuple[Node, asyncio.Future[m.Answer]]] = {}
        self._refusal: InputError | None = None
        self._joined = asyncio.Event()
        """Set when an agent has joined, or one was refused."""
        self._tasks = asyncio.TaskGroup()
        self._loops: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        address = f"tcp://{self._face.address}:{self._cluster.port}"
        self._end = LauncherEnd(self._context, address, self._keys, self._malformed)
        await self._tasks.__aenter__()
        for name, work in {"receive": self._receive(), "watch": self._watch(), "door": self._end.door.keep()}.items():
            self._loops.append(self._tasks.create_task(work, name=f"agents {name}"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        words = "the run is over" if error is None else f"the launcher has ended: {error or type(error).__name__}"
        for node in self.nodes.values():
            await self._end.send(node.route, m.Leave(words, False, 0.0))
        for loop in self._loops:
            loop.cancel()
        cancelled = error if isinstance(error, asyncio.CancelledError) else None
        try:
            await self._tasks.__aexit__(type(cancelled) if cancelled else None, cancelled, trace)
        finally:
            self._end.close()
            self._context.term()

    # --- joining -----------------------------------------------------------------------------------------------------

    async def gather(self, awaited: Sequence[str] = ()) -> list[Node]:
        """Wait for the agents of every host but the launcher's; returns them in the order of their names.

        `awaited` are the names that they will have, where these are known.

        Raises `DeadlineError` with who is there and how many are missing, and `InputError` when a host cannot be used.
        """
        wanted, began, said = self._cluster.nodes - 1, time.monotonic(), -SAY_EVERY_S
        address = f"{self._face.address}:{self._cluster.port}"
        while len(self.nodes) < wanted:
            waited = time.monotonic() - began
            there = f"{len(self.nodes)} of {wanted} agents ({', '.join(sorted(self.nodes)) or 'none'})"
            if missing := [name for name in awaited if name not in self.nodes]:
                there += f", without {', '.join(missing)},"
            if waited >= self._cluster.join_s:
                raise DeadlineError(
                    f"cluster.nodes: {there} have joined at {address} in {waited:.0f} s; start `python -m "
                    f"opd_async.agent --join {address}` on the others, and see that they reach this port"
                )
            if waited - said >= SAY_EVERY_S:  # not at each that joins: a line has the names of all that are there
                self._say(f"waiting at {address}: {there} after {waited:.0f} s")
                said = waited
            self._joined.clear()
            try:
                async with asyncio.timeout(min(said + SAY_EVERY_S, self._cluster.join_s) - waited):
                    await self._joined.wait()
            except TimeoutError:
                continue
            if self._refusal is not None:
                raise self._refusal
        self._open_to_all = False
        self._regular = set(self.nodes)
        self._say(f"agents of {', '.join(sorted(self.nodes, key=natural)) or 'no other host'} are here")
        return [self.nodes[name] for name in sorted(self.nodes, key=natural)]

    async def _join(self, route: bytes, join: m.Join) -> None:
        """Let an agent in, put it off, or refuse it."""
        node = self.nodes.get(join.host)
        if node is not None and node.incarnation == join.incarnation and node.there.is_set():
            await self._welcome(node)  # it has not heard the first answer
        elif node is None and self._is_early():
            words = "the run has its hosts, and takes others once it goes on"
            await self._end.send(route, m.Leave(words, False, EARLY_S))
        elif problem := unfit(join, self.nodes, self._versions, self._cluster, self._open_to_all or self.seats > 0):
            await self._end.send(route, m.Leave(problem, True, 0.0))
            if self._open_to_all:
                self._refusal = self._refusal or InputError(problem)
                self._joined.set()
        elif node is not None and node.drained:
            await self._end.send(route, m.Leave(DRAINED, False, DRAINED_S))
        elif node is not None and node.there.is_set() and join.before != node.incarnation:
            await self._second_claim(route, join, node)
        else:
            if node is not None and node.there.is_set():
                self._lose(node, "its agent has begun anew")
            await self._take(route, join, node)

    @property
    def seats(self) -> int:
        """How many hosts may still join beside those of the plan."""
        if self._open_to_all:
            return 0
        return self._cluster.spare_nodes - len(self.nodes.keys() - self._regular)

    def is_planned(self, node: Node) -> bool:
        """Whether a host is one of those that the run began with, and so has no seat."""
        return node.name in self._regular

    def _is_early(self) -> bool:
        """Whether a host that the run has no place for yet is to ask again: there are seats, and no run to sit in."""
        if self._open_to_all:
            return len(self.nodes) >= self._cluster.nodes - 1
        return self.seats > 0 and self.on_here is None

    async def dismiss(self, node: Node, reason: str, failed: bool = False, forget: bool = False) -> None:
        """Let the agent of a host go, whose processes have ended: nobody is told that the host is lost.

        With `forget` the run has never been on it, and its seat is free again.
        """
        node.there.clear()
        await self._end.send(node.route, m.Leave(reason, failed, 0.0))
        if forget:
            del self.nodes[node.name], self._by_route[node.route]

    async def put_off(self, node: Node, problem: str) -> None:
        """Give up a host that is there and cannot be used; its agent joins again, when that may have been mended."""
        await self._end.send(node.route, m.Leave(problem, True, UNFIT_S))
        self._lose(node, problem)

    async def _second_claim(self, route: bytes, join: m.Join, node: Node) -> None:
        """Refuse a name that another agent has, once that one has shown again that it lives."""
        beat_s = beat_seconds(self._cluster.fence_s)
        since = self._claims.setdefault((join.host, join.incarnation), time.monotonic())
        alive = node.heard > since + BEATS_OF_PROOF * beat_s
        words = f"another agent, at {node.address}, serves {join.host} already; give this host another --name"
        await self._end.send(route, m.Leave(words, True, 0.0) if alive else m.Leave(words, True, beat_s))

    async def _take(self, route: bytes, join: m.Join, node: Node | None) -> None:
        now = time.monotonic()
        if node is None:
            node = self.nodes[join.host] = Node(
                name=join.host, address=join.address, incarnation=join.incarnation, route=route, heard=now
            )
        else:
            del self._by_route[node.route]
            node.incarnation, node.route, node.heard = join.incarnation, route, now
            node.ended.clear()
            self._say(f"{join.host} is back")
        self._by_route[route] = node
        await self._welcome(node)
        node.there.set()
        self._joined.set()
        if self.on_here is not None:
            self.on_here(node)

    async def _welcome(self, node: Node) -> None:
        cluster = self._cluster
        await self._end.send(node.route, m.Welcome(cluster.fence_s, cluster.lost_s, self._stop_deadline_s))

    # --- asking ------------------------------------------------------------------------------------------------------

    async def ask(self, node: Node, request: Callable[[int], m.Message], deadline_s: float = ASK_S) -> m.Answer:
        """Send a request, made of its number, and return the answer.

        Raises `RoleError` with the agent's words, and `HostLostError` when the host is lost meanwhile.
        """
        if not node.there.is_set():
            raise HostLostError(f"{node.name} is lost")
        number = next(self._requests)
        future: asyncio.Future[m.Answer] = asyncio.get_running_loop().create_future()
        self._answers[number] = node, future
        try:
            await self._end.send(node.route, request(number))
            async with asyncio.timeout(deadline_s):
                answer = await future
        except TimeoutError:
            self._lose(node, f"its agent has left a request unanswered for {deadline_s:.0f} s")
            raise HostLostError(f"{node.name} does not answer; see its agent's output") from None
        finally:
            self._answers.pop(number, None)
        if answer.error is not None:
            raise RoleError(f"{node.name}: {answer.error}")
        return answer

    def tell(self, node: Node, message: m.Message) -> None:
        """Send a message that has no answer, in the background."""
        self.spawn(self._end.send(node.route, message), f"tell {node.name}")

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Run `work` until it ends or the agents are let go."""
        task = self._tasks.create_task(work, name=name)
        self._loops.append(task)
        task.add_done_callback(self._loops.remove)

    # --- loops -------------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            route, message = await self._end.receive()
            if isinstance(message, m.Join):
                await self._join(route, message)
                continue
            node = self._by_route.get(route)
            if node is None or not node.there.is_set():
                await self._end.send(route, m.Leave("the launcher has given this host up", True, 1.0))
                continue
            node.heard = time.monotonic()
            match message:
                case m.AgentBeat():
                    await self._end.send(route, m.AgentBeat(message.number, time.time()))
                case m.Answer():
                    _, future = self._answers.get(message.request, (node, None))
                    if future is not None and not future.done():
                        future.set_result(message)
                case m.ProcessEnded():
                    if message.number not in node.ended:
                        node.ended.add(message.number)
                        self.on_end(node, message)
                    await self._end.send(route, m.EndSeen(message.number))
                case m.Lines():
                    self.on_lines(message)
                case m.Farewell():
                    self._lose(node, message.reason)
                case _:
                    self._malformed(f"a {type(message).__name__} of {node.name}")

    async def _watch(self) -> None:
        """Give up hosts that are silent for `lost_s`."""
        every_s = beat_seconds(self._cluster.fence_s) / 2
        looked = time.monotonic()
        while True:
            await asyncio.sleep(every_s)
            now = time.monotonic()
            stood_still = max(now - looked - 2 * every_s, 0.0)  # nobody could be heard meanwhile
            looked = now
            for node in self.nodes.values():
                node.heard += stood_still
                if node.there.is_set() and now - node.heard >= self._cluster.lost_s:
                    self._lose(node, f"it was silent for {now - node.heard:.0f} s")

    def _lose(self, node: Node, reason: str) -> None:
        """Give a host up: every process of it has ended, and every request to it has failed."""
        if not node.there.is_set():
            return
        node.there.clear()
        node.lost_for = reason
        self._say(f"{node.name} is lost: {reason}")
        for asked, future in self._answers.values():
            if asked is node and not future.done():
                future.set_exception(HostLostError(f"{node.name} was lost: {reason}"))
        self.on_lost(node)
        self.on_missed(node)

    def _malformed(self, reason: str) -> None:
        self._say(f"dropped a message of an agent: {reason}")
