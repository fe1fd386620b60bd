"""Who has the word in an episode: its own code, which a deadline counts and which needs no slot, or the student."""

from __future__ import annotations

import asyncio

from opd_async.actors.rollout.episode_generation import EpisodeGeneration
from opd_async.role import Role
from opd_async.transport import messages as m

AWAY_AFTER_S = 0.2
"""A tool that takes longer frees its episode's slot; telling of shorter ones would cost more than it gains."""


class Patience:
    """The deadline of an episode's own code: it stands still while the student has a turn of it, one or several."""

    def __init__(self, scope: asyncio.Timeout) -> None:
        self._scope = scope
        self._left = 0.0
        self._turns = 0

    def turn_begins(self) -> None:
        """The student has the word."""
        if not self._turns:
            when = self._scope.when()
            assert when is not None
            self._left = when - asyncio.get_running_loop().time()
            self._scope.reschedule(None)
        self._turns += 1

    def turn_ends(self) -> None:
        """It has said what it had to say."""
        self._turns -= 1
        if not self._turns:
            self._scope.reschedule(asyncio.get_running_loop().time() + self._left)


class Away:
    """Tells the dispatcher when an episode has waited for its own code for a while, and when it is back: meanwhile it
    needs no slot."""

    def __init__(self, role: Role, generation: EpisodeGeneration) -> None:
        self._role = role
        self._generation = generation
        self._said = False
        self._task: asyncio.Task[None] | None = None

    def begins(self) -> None:
        """The episode's own code has the word."""
        self._generation.away = True
        if self._generation.lease.kind == m.LeaseKind.TRAIN:
            self._task = self._role.spawn(self._tell_later(), f"away-{self._generation.lease.sample_id}")

    async def _tell_later(self) -> None:
        await self._role.clock.sleep(AWAY_AFTER_S)
        self._said = True
        await self._tell(True)

    async def back(self) -> None:
        """The student has the word. On cancel: the dispatcher may think that the episode is away still."""
        await self.ends()
        if self._said:
            self._said = False
            await self._tell(False)

    async def ends(self) -> None:
        """Nothing more is to be told. On cancel: nothing is told either, and the task that would is cancelled."""
        self._generation.away = False
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None

    async def _tell(self, away: bool) -> None:
        lease = self._generation.lease
        await self._role.control.send(m.LeaseAway(lease.sample_id, lease.attempt, away))
