"""What a user's episode speaks to: generate a turn, give tokens, finish. One for each response.

await session.generate()   a turn of the student, streamed to the teacher and trained like any response
await session.give(...)    what a tool, a user or a template says: context, never trained
session.reward(value)      what the turn that has just ended has earned
await session.fork()       another session, which goes on from the same tokens: a sample of its own
session.finish(reward)     what the episode has earned; it is over
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.rollout.episode_generation import EpisodeGeneration, Stops
from opd_async.actors.rollout.given_text import GivenText, Message, beside_others, characters_of
from opd_async.actors.rollout.tool_calls import ToolCall, parse_calls
from opd_async.actors.rollout.tool_pool import ToolPool
from opd_async.errors import OpdError


class ResponseFullError(OpdError):
    """The response has as many tokens as `rollout.sampling.max_response_tokens` lets it have, or would have more."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What the student has said in one turn."""

    text: str
    """Without special tokens; with the text of `stop` that has ended it."""
    token_ids: tuple[int, ...]
    finish: Literal["stop", "length"]
    """Whether it ended by itself, or at `max_tokens`."""

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls of tools in it, as Hermes and Qwen write them; none if one of them is broken."""
        return parse_calls(self.text)[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds a response."""

    tokens: int
    """Most tokens behind the prompt, given ones included."""
    stop_token_ids: tuple[int, ...]
    vocab: int


CHARACTERS = 256
"""No token has more: a longer text has more tokens than fit, and is not even looked at."""


class Session:
    """The student as an episode sees it. Its calls follow one another; two at once are an error."""

    def __init__(
        self,
        *,
        generation: EpisodeGeneration,
        text: GivenText,
        limits: Limits,
        generate: Callable[[EpisodeGeneration], Awaitable[None]],
        deliver: Callable[[EpisodeGeneration], Awaitable[None]],
        begun: Callable[[EpisodeGeneration], None],
        fork: Callable[[NDArray[np.int32]], Awaitable[Session]],
        tools: ToolPool,
    ) -> None:
        """`generate` makes a turn, `deliver` sends what is there, `begun` is told of another prompt; `fork` makes a
        session that begins with other tokens."""
        self._tools = tools
        self._generation = generation
        self._begun = begun
        self.base_url = ""
        """Where an agent finds the student, with `rollout.endpoint: true`."""
        self.api_key = ""
        """What the agent shows there. It is this episode's, and ends with it."""
        self._text = text
        self._limits = limits
        self._generate = generate
        self._deliver = deliver
        self._fork = fork
        self._caller: asyncio.Task[Any] | None = None
        """Whose call is under way."""
        self._over = False
        self.earned: float | None = None
        """What `finish` was told."""
        self.turns: dict[int, float] = {}
        """What `reward` was told, by the position after the turn."""
        self._turn_end = 0

    @property
    def text(self) -> str:
        """The whole response so far, special and given tokens included."""
        return self._text.decode(self._generation.response()[: self._generation.position].tolist())

    @property
    def room(self) -> int:
        """How many tokens the response may still have."""
        return max(self._limits.tokens - self._generation.position, 0)

    async def tools(self) -> tuple[Mapping[str, Any], ...]:
        """The schemas of `rollout.tools`, in the form of OpenAI's API. On cancel: nothing has changed."""
        return await self._tools.schemas()

    async def call(self, call: ToolCall) -> str:
        """What one of `rollout.tools` says; for one that raises, hangs or dies, a text that says so.

        On cancel: its answer is dropped.
        """
        return await self._tools.call(call)

    async def use_tools(self, *, max_turns: int = 8, max_tokens: int | None = None) -> Turn:
        """Turns of the student, with what the tools say to its calls, until it calls none; the last turn.

        It ends after `max_turns` turns too, with the calls of the last one unanswered. Raises as `generate` and `give`.
        On cancel: what was said stays.
        """
        for left in range(max_turns, 0, -1):
            turn = await self.generate(max_tokens=max_tokens)
            if not turn.calls or left == 1:
                break
            said = [(call.name, await self.call(call)) for call in turn.calls]
            await self.give([{"role": "tool", "name": name, "content": text} for name, text in said])
        return turn

    @property
    def position(self) -> int:
        """Tokens of the response so far."""
        return self._generation.position

    @property
    def read(self) -> NDArray[np.int32]:
        """int32[prompt + response so far], what the student reads before it goes on."""
        ids = self._generation.input_ids()
        return ids[: len(self._generation.lease.prompt) + self._generation.position]

    @property
    def said(self) -> str:
        """The text of the last turn, or of the one under way so far, without special tokens."""
        return self._text.said(self._generation.turn().tolist())

    def listen(self, heard: Callable[[], None] | None) -> None:
        """Have `heard` called whenever tokens of a turn have arrived."""
        self._generation.heard = heard

    async def generate(self, *, max_tokens: int | None = None, stop: str | Sequence[str] = ()) -> Turn:
        """A turn of the student: until it ends by itself, at `max_tokens` tokens, or behind a text of `stop`.

        It waits for weight updates and lost engines like every response. Raises `ResponseFullError` if nothing fits.

        On cancel: what was sampled until then stays.
        """
        texts = (stop,) if isinstance(stop, str) else tuple(stop)
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"generate(max_tokens={max_tokens}): write 1 or more")
        if not all(texts):
            raise ValueError("generate(stop=...): an empty text ends every turn; leave it out")
        generation = self._generation
        with self._alone():
            if not self.room:
                raise ResponseFullError(f"the response has {generation.position} tokens, and may not have more")
            limit = generation.position + min(self.room, max_tokens or self.room)
            generation.begin_turn(limit, Stops(texts, self._text.decode), self._limits.stop_token_ids)
            try:
                await self._generate(generation)
            except asyncio.CancelledError:
                generation.new_request()  # no pause is to wait for what nobody reads
                raise
            finally:
                if len(generation.turn()):
                    self._turn_end = generation.position
        ids, finish = generation.turn().tolist(), generation.turn_finish
        assert finish is not None
        return Turn(self._text.said(ids), tuple(ids), "length" if finish.value == "length" else "stop")

    async def give(self, what: str | Sequence[Message]) -> None:
        """Put text, or messages in the form of the chat template, behind what was said so far.

        Raises `ResponseFullError`, and gives nothing, if it leaves no room for a token of the student.

        On cancel: it was given, or not.
        """
        generation = self._generation
        with self._alone():
            size = len(what) if isinstance(what, str) else characters_of(what)
            seen = generation.response()[: generation.position]
            if size > CHARACTERS * self.room:
                raise ResponseFullError(f"{size} characters for the {self.room} tokens that the response may have")
            last = int(seen[-1]) if len(seen) else None
            await self._give(await beside_others(size, lambda: self._text.encode(what, last)))

    async def fork(self) -> Session:
        """A session of the same episode that has said what this one has, and goes on in another way.

        It is a sample of its own: what it has in common with this one is given to it, and trained here alone. It ends
        with the episode at the latest, and has earned what that has, unless its own `finish` was told a reward.

        Raises `ResponseFullError` if nothing fits behind what was said, or the episode has too many conversations.

        On cancel: it may have begun; it ends with the episode.
        """
        with self._alone():
            return await self._fork(self.read)

    async def begin(self, ids: NDArray[np.int32]) -> None:
        """Begin with int32[n], n > 0, in place of the row's prompt, before anything was said.

        Where they begin with that prompt, what follows it is given. Else the first of them is the prompt and the others
        are given: no sample is longer than the row's prompt and a whole response, and an episode that is begun anew is
        compared with all that it gave. Raises `ResponseFullError`, and nothing has begun, if they leave no room.

        On cancel: as `give`.
        """
        generation = self._generation
        with self._alone():
            kept = prompt_in(ids, generation.lease.prompt, self._limits)
            generation.lease = replace(generation.lease, prompt=ids[:kept])
            self._begun(generation)
            await self._give(ids[kept:])

    async def _give(self, ids: NDArray[np.int32]) -> None:
        if len(ids) >= self.room:
            raise ResponseFullError(f"{len(ids)} tokens for the {self.room} that the response may have")
        if len(ids) and int(ids.max()) >= self._limits.vocab:
            raise ValueError(f"give: token {int(ids.max())} in a vocabulary of {self._limits.vocab}")
        new = self._generation.replay_given(ids)
        if len(new):
            self._generation.give(new)
            await self._deliver(self._generation)

    def finish(self, reward: float | None = None) -> None:
        """The episode is over and has earned `reward`; it may return it instead. Of a fork: that alone."""
        self.earned = number_of(reward)
        self._over = True

    def reward(self, value: float) -> None:
        """The turn that has ended last has earned `value`, beside what the episode earns at its end; more than one for
        a turn add up. Raises `RuntimeError` before the first turn, and `ValueError` for what is no finite number."""
        reward = number_of(value)
        if reward is None:
            raise ValueError("a reward of None; a turn that has earned nothing needs none")
        if self._over:
            raise RuntimeError("the episode is over")
        if not self._turn_end:
            raise RuntimeError("there is no turn yet that could have earned it")
        self.turns[self._turn_end] = self.turns.get(self._turn_end, 0.0) + reward

    async def close(self) -> None:
        """Nothing more may be said: the episode has ended. A call that it has left under way is cancelled.

        On cancel: that call may go on.
        """
        self._over = True
        if self._caller is not None and self._caller is not asyncio.current_task():
            self._caller.cancel()
            await asyncio.wait([self._caller])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._over:
            raise RuntimeError("the episode is over")
        if self._caller is not None:
            raise RuntimeError("a call of this session is under way; await one before the next")
        self._caller = asyncio.current_task()
        try:
            yield
        finally:
            self._caller = None


def prompt_in(ids: NDArray[np.int32], prompt: NDArray[np.int32], limits: Limits) -> int:
    """How many of int32[n] `ids`, with which a conversation begins, are the prompt of its sample: those of the row's
    `prompt`, or one. Raises `ResponseFullError` if the others leave no room."""
    kept = len(prompt) if np.array_equal(ids[: len(prompt)], prompt) else 1
    if len(ids) - kept >= limits.tokens:
        raise ResponseFullError(f"the messages have {len(ids)} tokens; {limits.tokens + kept - 1} leave room to answer")
    return kept


def number_of(reward: Any) -> float | None:
    """A reward as a finite number, None for none. Raises `ValueError` for anything else."""
    if reward is None:
        return None
    if not isinstance(reward, int | float) and not hasattr(reward, "__float__"):
        raise ValueError(f"a reward of {reward!r:.80}; return a number, or None")
    if not math.isfinite(value := float(reward)):
        raise ValueError(f"a reward of {value}; return a finite number, or None")
    return value
