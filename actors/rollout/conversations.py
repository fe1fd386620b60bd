"""Which sample of an episode a chat request goes on with, and what it adds: messages are compared, tokens are kept.

    messages = those of a conversation, its answer, and new ones -> only the new ones are rendered, tokenized and given
    any others (an edited history, another agent)                -> another conversation: a sample of its own

What the student has said is in the sample as it was sampled; its text is never tokenized again. A conversation that is
under way, or was broken off, is never gone on with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.rollout.chat_answer import Choice, choice_of
from opd_async.actors.rollout.chat_request import ChatRequest, record_of
from opd_async.actors.rollout.episode_generation import DivergedError
from opd_async.actors.rollout.given_text import beside_others, characters_of
from opd_async.actors.rollout.samples import EpisodeSamples
from opd_async.actors.rollout.session import ResponseFullError, Session
from opd_async.errors import OpdError


@dataclass(slots=True, kw_only=True)
class Conversation:
    """One sample, and the messages that it holds."""

    session: Session
    tools: str
    record: tuple[str, ...] = ()
    """`record_of` each message, answers included."""
    end: int = -1
    """Tokens of the response behind the last answer; any other number says that more, or less, was said."""
    busy: bool = True
    fault_before: OpdError | None = None
    """What the agent had been told when its request came."""

    def extended_by(self, request: ChatRequest, record: tuple[str, ...]) -> bool:
        """Whether a request goes on behind the last answer."""
        known = len(self.record)
        whole = not self.busy and self.end == self.session.position
        return whole and known < len(record) and record[:known] == self.record and self.tools == repr(request.tools)


class Conversations:
    """Those of one episode."""

    def __init__(self, samples: EpisodeSamples, count: Callable[[str], None]) -> None:
        """`count` is told what becomes of each request: extended or begun."""
        self._samples = samples
        self._count = count
        self._all: list[Conversation] = []
        self._first_taken = False
        self.fault: ResponseFullError | DivergedError | None = None
        """What an agent was told that its episode may end with, if it lets it pass."""

    async def begin(self, request: ChatRequest) -> list[Conversation]:
        """A conversation for each choice, ready for its turn: all given that the request says, and held by it.

        Raises `ResponseFullError`, `DivergedError`, and `InputError` for messages that the template refuses.
        On cancel: what was given stays; those conversations are not gone on with.
        """
        record = request.record()
        found = [one for one in self._all if one.extended_by(request, record)]
        held: list[Conversation] = []
        try:
            if found:
                held.append(max(found, key=lambda one: len(one.record)))
                await self._extend(held[0], request)
            else:
                held.append(await self._new(request, await self._render(request)))
            while len(held) < request.n:
                held.append(await self._new(request, held[0].session.read))
        except BaseException as error:
            if isinstance(error, ResponseFullError | DivergedError):
                self.fault = error
            self.release(held)
            raise
        self._count("extended" if found else "begun")
        for one in held:
            one.record, one.end, one.fault_before = record, -1, self.fault
        return held

    async def _extend(self, one: Conversation, request: ChatRequest) -> None:
        one.busy = True
        await one.session.give(list(request.messages[len(one.record) :]))

    async def _render(self, request: ChatRequest) -> NDArray[np.int32]:
        text = self._samples.text
        return await beside_others(characters_of(request.messages), lambda: text.begin(request.messages, request.tools))

    async def _new(self, request: ChatRequest, ids: NDArray[np.int32]) -> Conversation:
        takes_first = not self._first_taken and not self._samples.first.position
        self._first_taken = self._first_taken or takes_first
        try:
            session = self._samples.first if takes_first else await self._samples.further(ids)
            await session.begin(ids)
        except ResponseFullError:
            if takes_first:
                self._first_taken = False
            raise
        one = Conversation(session=session, tools=repr(request.tools))
        self._all.append(one)
        return one

    @staticmethod
    def release(held: list[Conversation]) -> None:
        """A request has nothing more to do with its conversations."""
        for one in held:
            one.busy = False

    async def turn(self, one: Conversation, request: ChatRequest, index: int) -> Choice:
        """The answer of one conversation. Raises `ResponseFullError`. On cancel: what was sampled stays."""
        read = len(one.session.read)
        try:
            turn = await one.session.generate(max_tokens=request.max_tokens, stop=request.stop)
        except ResponseFullError as error:
            self.fault = error
            raise
        if self.fault is one.fault_before:
            self.fault = None  # it was told, and went on
        choice = choice_of(turn, request, index, read)
        one.record = (*one.record, record_of(choice.for_record()))
        one.end = one.session.position
        return choice
