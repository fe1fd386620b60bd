"""Streams of the actors' client, collected in the background."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field

import numpy as np
from deadlines import patience
from numpy.typing import NDArray
from server_under_test import sampling

from opd_async.actors.client.engine_client import EngineClient
from opd_async.actors.client.replies import Delta
from opd_async.actors.rollout.abort_and_collect import abort_and_collect
from opd_async.clock import Clock


@dataclass(eq=False)
class Stream:
    """One request: what came of it, and whether it goes on."""

    client: EngineClient
    prompt: NDArray[np.int32]
    max_new_tokens: int
    key: str = "0"
    interval: int = 16
    pause_s: float = 0.0
    """A slow reader waits so long after each event."""
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)
    deltas: list[Delta] = field(default_factory=list)
    open: bool = True

    async def run(self, changed: asyncio.Condition) -> Stream:
        """Read to the end."""
        settings = sampling(self.max_new_tokens, self.interval)
        async for delta in self.client.stream(self.rid, self.prompt, settings, self.key):
            self.deltas.append(delta)
            await asyncio.sleep(self.pause_s)
            async with changed:
                changed.notify_all()
        async with changed:
            self.open = False
            changed.notify_all()
        return self

    @property
    def tokens(self) -> NDArray[np.int32]:
        """int32[n] generated so far."""
        return np.concatenate([np.zeros(0, np.int32), *(delta.token_ids for delta in self.deltas)])

    @property
    def logprobs(self) -> NDArray[np.float32]:
        """float32[n], one for each token."""
        return np.concatenate([np.zeros(0, np.float32), *(delta.logprobs for delta in self.deltas)])

    @property
    def ids(self) -> NDArray[np.int32]:
        """Prompt and response."""
        return np.concatenate([self.prompt, self.tokens])


class Crowd:
    """Streams that run at once."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.streams: list[Stream] = []
        self.changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[Stream]] = []

    def start(self, *streams: Stream) -> None:
        """Begin."""
        self.streams += streams
        self._tasks += [asyncio.create_task(stream.run(self.changed)) for stream in streams]

    async def until_each_has(self, tokens: int) -> None:
        """Return once every stream has so many tokens."""
        async with asyncio.timeout(patience(60.0)), self.changed:
            await self.changed.wait_for(lambda: all(len(stream.tokens) >= tokens for stream in self.streams))

    async def drain(self) -> None:
        """As a rollout actor drains its engine."""
        await abort_and_collect(self.client, lambda: [s for s in self.streams if s.open], self.changed, 60.0, Clock())

    async def finish(self) -> None:
        """Read all to their ends."""
        async with asyncio.timeout(patience(120.0)):
            await asyncio.gather(*self._tasks)

    async def abandon(self) -> None:
        """Stop reading: the connections are closed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
