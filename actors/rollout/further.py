"""Leases of further conversations: an episode asks the dispatcher for one each time that it begins another.

EpisodeSamples.further -> ask -> FurtherWanted (control) -> dispatcher -> FurtherLease (control) -> granted
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque

from opd_async.errors import DeadlineError
from opd_async.role import Role
from opd_async.transport import messages as m

DEADLINE_S = 120.0


class FurtherLeases:
    """What one rollout actor has asked for. Samples of one episode are alike: who waits longest has the next."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._asked: defaultdict[int, deque[asyncio.Future[m.FurtherLease]]] = defaultdict(deque)

    async def ask(self, first: m.Lease) -> m.FurtherLease:
        """A sample beside that of the lease `first`. Raises `DeadlineError` that names the launcher.

        On cancel: the sample is given back, as soon as it comes.
        """
        answer: asyncio.Future[m.FurtherLease] = asyncio.get_running_loop().create_future()
        self._asked[first.sample_id].append(answer)
        await self._role.control.send(m.FurtherWanted(first.sample_id, first.attempt))
        try:
            async with self._role.clock.timeout(DEADLINE_S):
                try:
                    return await answer
                except asyncio.CancelledError:
                    if answer.done() and not answer.cancelled():  # it came in the same moment
                        await self._give_back(answer.result())
                    raise
        except TimeoutError:
            raise DeadlineError(
                f"sample {first.sample_id}: the launcher leased no further conversation in {DEADLINE_S:.0f} s"
            ) from None

    async def granted(self, lease: m.FurtherLease) -> None:
        """A sample has come; one that nobody waits for any more is given back. On cancel: it may not have been."""
        asked = self._asked[lease.episode]
        while asked and asked[0].done():
            asked.popleft()
        answer = asked.popleft() if asked else None
        if not asked:
            del self._asked[lease.episode]
        if answer is None:
            await self._give_back(lease)
        else:
            answer.set_result(lease)

    async def _give_back(self, lease: m.FurtherLease) -> None:
        await self._role.control.send(m.FurtherUnused(lease.sample_id, lease.attempt))

    def forget(self) -> None:
        """Nothing that was asked for comes any more: the run goes back to a checkpoint."""
        self._asked.clear()
