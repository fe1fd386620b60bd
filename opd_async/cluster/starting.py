"""How the agents of a run get onto its hosts: what differs between the backends, and nothing else does.

Starter    agents   started by somebody else: the launcher only waits
           slurm    one srun on the nodes of the allocation (`slurm.py`)
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Protocol, Self

from opd_async.cluster.nodes import Node
from opd_async.cluster.secret import take_secret
from opd_async.keys import RunKeys


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
