"""An intake's line to its learner ranks, and the first one's to the other intakes: to each of them in one order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import zmq.asyncio

from opd_async.errors import DeadlineError
from opd_async.plan.plan import Plan, RoleKind, role_name
from opd_async.transport.channels import ControlServer
from opd_async.transport.door import Door
from opd_async.transport.messages import Hello, Message, PartDone, Train

log = logging.getLogger(__name__)


class LearnerRanks:
    """The ranks that the intake `index` feeds. The first one passes commands to the other intakes too, which pass them
    on to their ranks. Nothing is sent before all of them are there."""

    def __init__(
        self, context: zmq.asyncio.Context, plan: Plan, malformed: Callable[[str], None], door: Door, index: int = 0
    ) -> None:
        self._learner, self._intakes = plan.topology.learner, plan.intakes
        self._deadline_s = plan.topology.supervisor.start_deadline_s
        self._ranks = [rank for rank in range(self._learner.ranks) if plan.intake_of_rank(rank) == index]
        self.others = [role_name(RoleKind.INTAKE, other) for other in range(1, plan.intakes)] if index == 0 else []
        """Names of the other intakes, where this is the first."""
        self._names = [*(f"rank-{rank}" for rank in self._ranks), *self.others]
        self._malformed = malformed
        self._server = ControlServer(context, plan.batches[index], malformed, door)
        self._up: set[str] = set()
        self.on_part_done: Callable[[PartDone], None] = lambda done: None
        """What is done when rank 0 has trained a part."""
        self.on_other: Callable[[str, Message], None] = lambda name, message: None
        """What is done with a message of another intake."""
        self._all_up = asyncio.Event()

    async def collect(self) -> None:
        """Note each rank that says hello; sending waits for all of them. Pass on which parts are trained.

        On cancel: nothing further is noted.
        """
        while True:
            name, message = await self._server.receive()
            if name not in self._names:
                self._malformed(f"a {type(message).__name__} of {name!r:.80}, which is no rank")
            elif isinstance(message, PartDone):
                self.on_part_done(message)
            elif isinstance(message, Hello) or name not in self.others:
                self._up.add(name)
                if len(self._up) == len(self._names):
                    self._all_up.set()
            else:
                self.on_other(name, message)

    async def send_step(self, shares: Sequence[Train]) -> None:
        """Send a step or a part: `shares` has one message for each data-parallel rank that this intake feeds.

        Raises `DeadlineError` for missing ranks.
        On cancel: some ranks may have the step; the learner must then go back to a checkpoint.
        """
        for rank in self._ranks:
            await self._send(f"rank-{rank}", shares[self._learner.data_rank(rank) // self._intakes])

    async def send_all(self, message: Message) -> None:
        """Send a command to every rank, and to every other intake. Raises and on cancel: as `send_step`."""
        for name in self._names:
            await self._send(name, message)

    async def send_other(self, name: str, message: Message) -> None:
        """Send to another intake. Raises and on cancel: as `send_step`."""
        await self._send(name, message)

    async def _send(self, name: str, message: Message) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._all_up.wait()
        except TimeoutError:
            raise DeadlineError(self._missing()) from None
        if not await self._server.send(name, message):
            log.warning("%s is gone; a %s was not delivered", name, type(message).__name__)

    def _missing(self) -> str:
        missing = [rank for rank in self._ranks if f"rank-{rank}" not in self._up]
        if missing:
            return f"learner ranks {missing} did not connect in {self._deadline_s:.0f} s; see learner-0.log"
        others = ", ".join(name for name in self.others if name not in self._up)
        return f"{others} did not connect to the first intake in {self._deadline_s:.0f} s; see its log"

    def close(self) -> None:
        """Close the socket."""
        self._server.close()
