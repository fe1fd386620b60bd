"""Start the agents of a run on the nodes of a Ray cluster: an actor on each keeps one there (`ray_driver.py`).

    enter -> a bundle on each node, of what the run takes there -> names of the hosts
    begin -> an actor in each bundle but the launcher's -> agents -> the launcher
    lost  -> an actor on that node, again and again until its agent is there

Ray carries nothing of a run, and is no judge of what is alive: the leases of the agents are. The secret travels as an
argument of an actor's method, never in a runtime environment, which Ray shows.

loop     waits for                           unblocked by
answers  a line of Ray's process             Ray, its end
stderr   what Ray prints                     Ray, its end
agent    the end of an agent                 the agent, Ray
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from opd_async.cluster.nodes import Node
from opd_async.cluster.secret import given_or_drawn, take_secret
from opd_async.cluster.starting import LEAVE_S, TAIL, Returns, Started, agent_command
from opd_async.config.clustering import ClusterSection
from opd_async.errors import DeadlineError, InputError
from opd_async.process import PARENT_ENV

SCRIPT = Path(__file__).with_name("ray_driver.py")
CONNECT_S = 120.0
"""How long the connection to Ray may take, and its answer beside the time that nodes have to come."""
JOIN_S = 120.0
"""An agent that was started again and has not joined for so long is given up: its actor waits for a node."""
LINE_BYTES = 1 << 20
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class RayProcess:
    """Ray's side, in a process of its own: one that hangs or dies takes no launcher with it."""

    def __init__(self, python: str, say: Callable[[str], None]) -> None:
        self._python = python
        self._say = say
        self._numbers = itertools.count(1)
        self._ends: dict[int, asyncio.Future[tuple[int, list[str]]]] = {}
        self._hosts: asyncio.Future[dict[str, str]] = asyncio.get_running_loop().create_future()
        self._connected = asyncio.Event()
        self._tail: deque[str] = deque(maxlen=TAIL)
        self._process: asyncio.subprocess.Process | None = None
        self._loops: list[asyncio.Task[None]] = []
        self.over = False

    async def open(self, request: dict[str, Any], wait_s: float) -> dict[str, str]:
        """Start it; returns the address of each host by its name, for which nodes have `wait_s` to come.

        Raises `InputError` for what Ray cannot give. On cancel: `close` is still due.
        """
        pipe = asyncio.subprocess.PIPE
        # the guard ties it to this process, and is this Python, which Ray's own may have no package of
        guard = (sys.executable, "-m", "opd_async.process", self._python, "-P", str(SCRIPT))
        self._process = await asyncio.create_subprocess_exec(
            *guard,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            limit=LINE_BYTES,
            env={**os.environ, PARENT_ENV: str(os.getpid())},
            start_new_session=True,  # Ctrl-C is for the launcher, which ends the agents in order
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        self._loops = [
            asyncio.create_task(self._answers(self._process.stdout), name="Ray's answers"),
            asyncio.create_task(self._listen(self._process.stderr), name="Ray's stderr"),
        ]
        await self._tell(request)
        within_s = CONNECT_S
        try:
            async with asyncio.timeout(within_s):
                await self._connected.wait()
            within_s += wait_s
            async with asyncio.timeout(within_s):
                return await self._hosts
        except TimeoutError:
            raise DeadlineError(
                f"cluster.backend: ray, and Ray has not answered for {within_s:.0f} s; see `ray status` on this host"
            ) from None

    async def keep(self, host: str, command: list[str], environment: dict[str, str]) -> tuple[int, list[str]]:
        """Keep a command on a host until its end; returns its exit code and last lines. On cancel: it is ended."""
        number, end = next(self._numbers), asyncio.get_running_loop().create_future()
        if self.over:
            return 1, list(self._tail)
        self._ends[number] = end
        words = {"start": number, "host": host, "command": command, "environment": environment}
        await self._tell({**words, "folder": str(Path.cwd())})
        try:
            found: tuple[int, list[str]] = await end
            return found
        except asyncio.CancelledError:
            await self._tell({"stop": number})
            raise
        finally:
            self._ends.pop(number, None)

    async def close(self) -> None:
        """End it, and with it every actor. On cancel: it is killed when this process ends."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(LEAVE_S):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        finally:
            for loop in self._loops:
                loop.cancel()
            await asyncio.gather(*self._loops, return_exceptions=True)
            self._give_up("it was told to end")

    async def _tell(self, words: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with suppress(ConnectionError):  # its end is told by `_answers`
            self._process.stdin.write(json.dumps(words).encode() + b"\n")
            await self._process.stdin.drain()

    async def _answers(self, lines: asyncio.StreamReader) -> None:
        """Take its answers. At its end every command is over: no actor outlives it."""
        while line := await lines.readline():
            answer = json.loads(line)
            if "connected" in answer:
                self._connected.set()
            elif "say" in answer:
                self._say(f"ray: {answer['say']}")
            elif "ended" in answer and (end := self._ends.get(answer["ended"])) is not None and not end.done():
                end.set_result((answer["code"], answer["lines"]))
            elif "hosts" in answer and not self._hosts.done():
                self._hosts.set_result(answer["hosts"])
            elif "error" in answer and not self._hosts.done():
                self._hosts.set_exception(InputError(f"cluster.backend: ray, and {answer['error']}"))
                self._connected.set()
        await asyncio.wait(self._loops[1:], timeout=1.0)  # for its last words
        self._give_up(" | ".join(self._tail) or "it said nothing")

    def _give_up(self, words: str) -> None:
        """Nothing is kept any more."""
        self.over = True
        self._connected.set()
        if not self._hosts.done():
            self._hosts.set_exception(InputError(f"cluster.backend: ray, and Ray's process has ended: {words}"))
        for end in self._ends.values():
            if not end.done():
                end.set_result((1, [f"Ray's process has ended: {words}"]))

    async def _listen(self, lines: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await lines.readline()
            except ValueError:  # longer than the reader keeps: dropped by it
                continue
            if not line:
                return
            self._tail.append(COLOUR.sub("", line.decode(errors="replace")).rstrip()[:300])


class RayAgents:
    """The agents of one run. See `Starter`."""

    def __init__(self, cluster: ClusterSection, say: Callable[[str], None]) -> None:
        """Raises `InputError` where a secret was given that cannot be used."""
        self._cluster = cluster
        self._say = say
        self._variables = given_or_drawn(os.environ)
        self.keys = take_secret(dict(self._variables))
        self.awaited: tuple[str, ...] = ()
        self._hosts: dict[str, str] = {}
        self._place = ""
        self._ray: RayProcess | None = None
        self._opening = asyncio.Lock()
        self._started = Started(say)
        self._returns = Returns(self._start, say, JOIN_S)

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._close()
            raise
        self.awaited = tuple(self._hosts)[1:]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._returns.close()
        await self._started.end()
        await self._close()

    def begin(self, place: str) -> None:
        """See `Starter`."""
        self._place = place
        if self.awaited:
            self._say(f"starting agents on {', '.join(self.awaited)} by Ray")
            for host in self.awaited:
                self._start(host)

    async def broken(self) -> None:
        """See `Starter`. On cancel: nothing is undone."""
        await self._started.broken("cluster.backend: ray, and an agent has not stayed on its node: ")

    def lost(self, node: Node) -> None:
        """See `Starter`."""
        self._returns.begin(node)

    async def _open(self) -> RayProcess:
        """Ray's process, started again where it has ended: then it starts on the hosts that are known."""
        async with self._opening:
            if self._ray is None or self._ray.over:
                await self._close()
                cluster = self._cluster
                ray = self._ray = RayProcess(cluster.ray_python or sys.executable, self._say)
                request = {"hosts": self._hosts, "bundles": bundles(cluster), "wait_s": cluster.join_s}
                self._hosts = await ray.open(request, cluster.join_s)
            return self._ray

    async def _close(self) -> None:
        if self._ray is not None:
            await self._ray.close()

    def _start(self, host: str) -> asyncio.Task[int]:
        return self._started.run(self._keep(host), f"agent of {host}")

    async def _keep(self, host: str) -> int:
        """Keep an agent on a host until its end; returns its exit code. On cancel: it is ended."""
        ray = await self._open()
        agent = [*agent_command(self._cluster, self._place), "--name", host]
        guarded = [agent[0], "-m", "opd_async.process", *agent]  # the end of the actor is the end of the agent
        code, lines = await ray.keep(host, guarded, self._variables)
        self._started.last.append(f"{host}: {' | '.join(lines) or f'exit code {code}'}")
        if code:
            self._say(f"agent of {host} ended: {' | '.join(lines) or f'exit code {code}'}")
        return code


def bundles(cluster: ClusterSection) -> list[dict[str, float]]:
    """What a run takes of each node, the launcher's first: GPUs, or CPUs where it has none."""
    each: dict[str, float] = {"CPU": cluster.slots_per_node}
    if cluster.gpus_per_node:
        each = {"GPU": cluster.gpus_per_node}
    return [each if cluster.launcher_takes_devices else {}, *[each] * (cluster.nodes - 1)]
