"""The intake's line to the learner's ranks: steps and commands, to every rank in one order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import zmq.asyncio

from opd_async.errors import DeadlineError
from opd_async.plan.plan import Plan
from opd_async.transport.channels import ControlServer
from opd_async.transport.door import Door
from opd_async.transport.messages import Message, PartDone, Train

log = logging.getLogger(__name__)


class LearnerRanks:
    """All ranks of the learner; nothing is sent before all of them are there."""

    def __init__(self, context: zmq.asyncio.Context, plan: Plan, malformed: Callable[[str], None], door: Door) -> None:
        self._learner = plan.topology.learner
        self._deadline_s = plan.topology.supervisor.start_deadline_s
        self._names = {f"rank-{rank}" for rank in range(self._learner.ranks)}
        self._malformed = malformed
        self._server = ControlServer(context, plan.batches, malformed, door)
        self._up: set[str] = set()
        self.on_part_done: Callable[[PartDone], None] = lambda done: None
        """What is done when rank 0 has trained a part."""
        self._all_up = asyncio.Event()

    async def collect(self) -> None:
        """Note each rank that says hello; sending waits for all of them. Pass on which parts are trained.

        On cancel: nothing further is noted.
        """
        while True:
            rank, message = await self._server.receive()
            if rank not in self._names:
                self._malformed(f"a {type(message).__name__} of {rank!r:.80}, which is no rank")
                continue
            if isinstance(message, PartDone):
                self.on_part_done(message)
                continue
            self._up.add(rank)
            if len(self._up) == self._learner.ranks:
                self._all_up.set()

    async def send_step(self, shares: Sequence[Train]) -> None:
        """Send a step or a part: `shares` has one message for each data-parallel rank.

        Raises `DeadlineError` for missing ranks.
        On cancel: some ranks may have the step; the learner must then go back to a checkpoint.
        """
        for rank in range(self._learner.ranks):
            await self._send(rank, shares[self._learner.data_rank(rank)])

    async def send_all(self, message: Message) -> None:
        """Send a command to every rank. Raises and on cancel: as `send_step`."""
        for rank in range(self._learner.ranks):
            await self._send(rank, message)

    async def _send(self, rank: int, message: Message) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._all_up.wait()
        except TimeoutError:
            missing = [r for r in range(self._learner.ranks) if f"rank-{r}" not in self._up]
            raise DeadlineError(
                f"learner ranks {missing} did not connect in {self._deadline_s:.0f} s; see learner-0.log"
            ) from None
        if not await self._server.send(f"rank-{rank}", message):
            log.warning("learner rank %d is gone; a %s was not delivered", rank, type(message).__name__)

    def close(self) -> None:
        """Close the socket."""
        self._server.close()
