"""How the agents of a run get onto its hosts: what differs between the backends, and nothing else does.

Starter    agents   started by somebody else: the launcher only waits
           slurm    one srun on the nodes of the allocation (`slurm.py`)
           ray      an actor of Ray on each node (`ray_nodes.py`)

loop        waits for                       unblocked by
bring back  the end of an agent             the agent, a node that is down
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Protocol, Self

from opd_async.cluster.nodes import Node
from opd_async.cluster.secret import take_secret
from opd_async.config.clustering import ClusterSection
from opd_async.errors import InputError
from opd_async.keys import RunKeys

AGENT_WAIT_S = 60.0
"""An agent without a launcher ends so long after its fence; on a host that comes back later another one is started."""
AGAIN_S = 10.0
LEAVE_S = 15.0
"""How long agents that were let go may take, and then what has started them."""
TAIL = 6
"""Last lines that are kept for an error."""


def agent_command(cluster: ClusterSection, place: str) -> list[str]:
    """The command of an agent that the launcher starts on another host."""
    python = cluster.python or sys.executable
    words = [python, "-m", "opd_async.agent", "--join", place, "--wait-s", f"{AGENT_WAIT_S:g}"]
    return words if cluster.interface is None else [*words, "--interface", cluster.interface]


class Starter(Protocol):
    """Entered before the launcher listens for agents, left when all of them have been let go."""

    keys: RunKeys
    """The keys of the line to the agents."""
    awaited: tuple[str, ...]
    """Names of the hosts that will join; none where only their number is known."""

    async def __aenter__(self) -> Self:
        """Take what ends with the block."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave no agent running. On cancel: agents that are left end by themselves, without a launcher."""

    def begin(self, place: str) -> None:
        """Have an agent join at `place`, the launcher's `address:port`, on every host but the launcher's."""

    async def broken(self) -> None:
        """Wait until an agent cannot be had: `OpdError`. Returns never. On cancel: nothing is undone."""

    def lost(self, node: Node) -> None:
        """Have another agent on a host that was lost, as soon as that is possible."""


class ByOthers:
    """`backend: agents`: Kubernetes, ssh or a person starts them, and starts them again."""

    def __init__(self) -> None:
        """Raises `InputError` where there is no secret."""
        self.keys = take_secret()
        self.awaited: tuple[str, ...] = ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was started."""

    def begin(self, place: str) -> None:
        """They know the place."""

    async def broken(self) -> None:
        """Nobody would say so. On cancel: nothing is undone."""
        await asyncio.Event().wait()

    def lost(self, node: Node) -> None:
        """Whoever has started the agent starts another one."""


class Started:
    """The agents that a launcher has started by somebody else's means: tasks, each of which ends with its agents."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._runs: set[asyncio.Task[int]] = set()
        self.last: deque[str] = deque(maxlen=TAIL)
        """What was heard last of them."""
        self.trouble = asyncio.Event()
        """Set once one has ended, or cannot be had."""

    def run(self, work: Coroutine[Any, Any, int], name: str) -> asyncio.Task[int]:
        """Start agents by `work`, which returns an exit code, and ends them on cancel."""
        run = asyncio.create_task(work, name=name)
        self._runs.add(run)
        run.add_done_callback(self._ended)
        return run

    def _ended(self, run: asyncio.Task[int]) -> None:
        self._runs.discard(run)
        if not run.cancelled() and (error := run.exception()) is not None:
            self.last.append(f"{run.get_name()}: {error}")
            self._say(self.last[-1])
        self.trouble.set()

    async def broken(self, words: str) -> None:
        """Wait for trouble, then raise `InputError` with `words` and what was heard. On cancel: nothing is undone."""
        await self.trouble.wait()
        await asyncio.sleep(1.0)  # what follows the first line says more, and what the launcher refused it says itself
        raise InputError(words + " | ".join(self.last))

    async def end(self) -> None:
        """Wait for agents that were let go, and end those that are left. On cancel: they end without a launcher."""
        if self._runs:
            await asyncio.wait(self._runs, timeout=LEAVE_S)
        for run in self._runs:
            run.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)


class Returns:
    """Has agents back on hosts that were lost: on each it starts one after the other, until one has joined."""

    def __init__(
        self, start: Callable[[str], asyncio.Task[int]], say: Callable[[str], None], patience_s: float | None = None
    ) -> None:
        """`start` starts an agent on a host, by its name: a task that ends with the agent, and ends it on cancel. One
        that has neither ended nor joined within `patience_s` is cancelled."""
        self._start = start
        self._say = say
        self._patience_s = patience_s
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, node: Node) -> None:
        """Have an agent back on this host."""
        if node.name in self._tasks:
            return
        task = asyncio.create_task(self._bring_back(node), name=f"agent for {node.name}")
        self._tasks[node.name] = task
        task.add_done_callback(lambda done: self._tasks.pop(node.name, None))

    async def close(self) -> None:
        """Give up what has not joined. On cancel: the same."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _bring_back(self, node: Node) -> None:
        """Have an agent on one host until that has joined. On cancel: what was started is told to end."""
        while not node.there.is_set():
            self._say(f"starting an agent on {node.name}")
            run = self._start(node.name)
            back = asyncio.create_task(node.there.wait())
            try:
                await asyncio.wait((run, back), timeout=self._patience_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                back.cancel()
                if not node.there.is_set():
                    run.cancel()
            if not node.there.is_set():
                await asyncio.sleep(AGAIN_S)
