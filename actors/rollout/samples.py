"""The samples of one episode: the one that its lease asks for, and those that other conversations of it have begun."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.rollout.episode_generation import EpisodeGeneration
from opd_async.actors.rollout.given_text import GivenText
from opd_async.actors.rollout.session import Limits, ResponseFullError, Session, prompt_in
from opd_async.actors.rollout.tool_pool import ToolPool
from opd_async.actors.rollout.waiting import Away, Patience
from opd_async.role import Role
from opd_async.scheduling.further import MAX_FURTHER
from opd_async.transport import messages as m


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a rollout actor does for an episode."""

    generate: Callable[[EpisodeGeneration], Awaitable[None]]
    """Makes a turn."""
    deliver: Callable[[EpisodeGeneration], Awaitable[None]]
    """Sends what is there."""
    begun: Callable[[EpisodeGeneration], None]
    """The sample has another prompt than its lease, and nothing of it was sent."""
    further: Callable[[EpisodeGeneration, int], Awaitable[EpisodeGeneration]]
    """Begins another conversation of an episode, by its number, from 1 on: a sample of its own."""
    left: Callable[[EpisodeGeneration, int], None]
    """Nothing more comes of such a conversation."""


class EpisodeSamples:
    """The sessions of one episode, and whom to tell of their turns."""

    def __init__(
        self, *, role: Role, first: EpisodeGeneration, text: GivenText, limits: Limits, work: Work, tools: ToolPool
    ) -> None:
        self.text, self.limits, self._tools = text, limits, tools
        self._role, self._work = role, work
        self._first, self._prompt = first, first.lease.prompt
        self._all: list[tuple[EpisodeGeneration, Away]] = []
        self._sessions: list[Session] = []
        self._begun = 0
        self.first: Session

    def begin(self, patience: Patience) -> None:
        """The episode's own code has the word, with a session on the sample of its lease."""
        self._patience = patience
        self.first = self._session(self._first)

    @property
    def further_ones(self) -> list[EpisodeGeneration]:
        """The samples of all conversations but the first."""
        return [generation for generation, _ in self._all[1:]]

    @property
    def empty(self) -> bool:
        """Whether the student has said nothing."""
        return all(one.length == one.given_tokens for one, _ in self._all)

    def _session(self, generation: EpisodeGeneration) -> Session:
        away = Away(self._role, generation)

        async def turn(generation: EpisodeGeneration) -> None:
            self._patience.turn_begins()
            try:
                await away.back()
                await self._work.generate(generation)
                await self._work.deliver(generation)
            finally:
                away.begins()
                self._patience.turn_ends()

        session = Session(
            generation=generation,
            text=self.text,
            limits=self.limits,
            generate=turn,
            deliver=self._work.deliver,
            begun=self._work.begun,
            fork=self._fork,
            tools=self._tools,
        )
        self._all.append((generation, away))
        self._sessions.append(session)
        away.begins()
        return session

    async def further(self, ids: NDArray[np.int32]) -> Session:
        """A session that has still to begin with int32[n] `ids`. Raises `ResponseFullError` if they do not fit, or if
        there are too many, and `DeadlineError` if the launcher gives it no sample.

        On cancel: it may have begun; it ends with the episode.
        """
        prompt_in(ids, self._prompt, self.limits)
        if self._begun >= MAX_FURTHER:
            raise ResponseFullError(f"the episode has {self._begun + 1} conversations, and may not have more")
        self._begun += 1
        return self._session(await self._work.further(self._first, self._begun))

    async def _fork(self, ids: NDArray[np.int32]) -> Session:
        """A session that has begun with int32[n] `ids`. Raises as `further`. On cancel: as `further`."""
        session = await self.further(ids)
        await session.begin(ids)
        return session

    async def close(self) -> None:
        """The episode is over: calls under way are cancelled. On cancel: some may go on."""
        for session in self._sessions:
            await session.close()

    async def rest(self) -> None:
        """Tell nobody any more who has the word. On cancel: the dispatcher may be told once more."""
        for _, away in self._all:
            await away.ends()

    async def finish(self, finish: m.Finish, reward: float | None, *, rewards: bool) -> None:
        """Every sample ends as the episode does, and has earned what it has; `rewards`: where the run asks for that.

        Of an episode that came to its end by itself, turns have earned what they were told, and a fork in place of the
        episode's reward its own, if it has one.

        On cancel: some have not ended.
        """
        for (generation, _), session in zip(self._all, self._sessions, strict=True):
            generation.finish = finish
            if finish is m.Finish.STOP and rewards:
                generation.rewarded(self._earned(session, reward), session.turns)
            elif rewards or finish is m.Finish.FAILED:
                generation.rewarded(reward)
            await self._work.deliver(generation)

    def _earned(self, session: Session, reward: float | None) -> float | None:
        """All that a conversation has earned."""
        own = reward if session is self.first or session.earned is None else session.earned
        return own if not session.turns else (own or 0.0) + sum(session.turns.values())

    def leave(self) -> None:
        """Nothing more comes of the episode."""
        for number, (generation, _) in enumerate(self._all):
            if number:
                self._work.left(generation, number)
