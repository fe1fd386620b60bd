"""One host of a run: join the launcher, serve it, and end every process when it cannot be heard.

    join -> Welcome -> Service (`service.py`) -> Leave -> join again, or end

    loop      waits for                       unblocked by
    refused   a handshake that failed         a launcher with another secret

Whatever ends a loop ends the incarnation: every process of the host is killed, then the agent joins anew or ends. If
the agent itself is killed, the kernel kills its processes (`opd_async.process.die_with_parent`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from typing import Any

import zmq.asyncio

from opd_async.cluster.line import AgentEnd
from opd_async.cluster.service import HostFacts, LoudLines, Service
from opd_async.cluster.supervisor import Supervisor
from opd_async.errors import DeadlineError, InputError
from opd_async.keys import RunKeys, new_incarnation
from opd_async.transport import messages as m

JOIN_EVERY_S = 2.0
FAREWELL_S = 2.0
"""How long an agent that is told to end tries to say so."""


class Agent:
    """Serves one host until the launcher lets it go."""

    def __init__(
        self,
        place: str,
        keys: RunKeys,
        facts: HostFacts,
        wait_s: float,
        say: Callable[[str], None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`place` is the launcher's `address:port`; without a launcher there for `wait_s` the agent ends. `wall` is
        this host's clock."""
        self._place = place
        self._keys = keys
        self._facts = facts
        self._wait_s = wait_s
        self._say = say
        self._wall = wall
        self._before = ""
        self._incarnation = new_incarnation()
        """Stays while the launcher puts it off."""

    async def run(self) -> None:
        """Join, serve, and join again after the lease has run out. On cancel: every process of the host is killed.

        Returns when the run is over. Raises `OpdError` when the launcher refuses this host, or is not there.
        """
        while True:
            leave = await self._one_incarnation()
            if leave.again_s <= 0:
                if leave.failed:
                    raise InputError(leave.reason)
                self._say(leave.reason)
                return
            self._say(f"{leave.reason}; joining again")
            await asyncio.sleep(leave.again_s)

    async def _one_incarnation(self) -> m.Leave:
        incarnation = self._incarnation
        with (
            zmq.asyncio.Context() as context,
            AgentEnd(context, f"tcp://{self._place}", self._keys, incarnation) as end,
        ):
            answer: m.Welcome | m.Leave = await first(self._join(end, incarnation), end.refused())
            if isinstance(answer, m.Leave):
                return answer
            self._before, self._incarnation = incarnation, new_incarnation()
            self._say(f"{self._facts.name} ({self._facts.face.address}) serves the run of {self._place}")
            return await self._serve(end, answer)

    async def _join(self, end: AgentEnd, incarnation: str) -> m.Welcome | m.Leave:
        """Ask to be let in until there is an answer."""
        facts = self._facts
        join = m.Join(
            host=facts.name,
            incarnation=incarnation,
            before=self._before,
            address=facts.face.address,
            gpus=facts.gpus,
            cores=facts.cores,
            versions=facts.versions,
        )
        give_up = time.monotonic() + self._wait_s
        while (left_s := give_up - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(min(JOIN_EVERY_S, left_s)):
                    await end.send(join)
                    while not isinstance(answer := await end.receive(), m.Welcome | m.Leave):
                        continue  # an echo to the incarnation before
                    return answer
            except TimeoutError:
                continue
        raise DeadlineError(
            f"{self._place}: no launcher has answered for {self._wait_s:.0f} s; start it there, or look at "
            f"cluster.port and "
            "at firewalls"
        )

    async def _serve(self, end: AgentEnd, welcome: m.Welcome) -> m.Leave:
        lines = LoudLines()
        with ExitStack() as claims:
            async with Supervisor(lines.add, welcome.stop_deadline_s, on_unwritten=lines.unwritten) as supervisor:
                service = Service(end, supervisor, lines, self._facts, welcome, claims=claims, wall=self._wall)
                try:
                    leave: m.Leave = await first(service.obey(), service.report(), service.beat(), end.refused())
                    return leave
                except asyncio.CancelledError:
                    await supervisor.stop_all((), at_once=True)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(FAREWELL_S):
                            await end.send(m.Farewell("its agent was told to end"))
                    raise


async def first(*work: Coroutine[Any, Any, Any]) -> Any:
    """Return what the first of these returns, or raise what it raises; the others are cancelled, and waited for."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
