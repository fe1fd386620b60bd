"""A null engine inside the actor's process, below the client's interface: no HTTP, no JSON, no waiting.

A stream hands over events of `stream_interval` tokens and lets the event loop turn between two of them, as a socket
would. Pause and resume are the real calls to the null server, which alone knows the weight version.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.client.engine_client import EngineClient, Sampling
from opd_async.actors.client.replies import Delta, Scores
from opd_async.bench.wire.pattern import LOGPROBS, SCORES, TOKENS, TOPK_IDS, TOPK_LOGPROBS
from opd_async.estimators.topk import TopK
from opd_async.transport.messages import Finish


class NullClient(EngineClient):
    """`EngineClient` whose generation and scoring answer at once."""

    _flowing: asyncio.Event | None = None
    _version = "-1"

    @property
    def _gate(self) -> asyncio.Event:
        if self._flowing is None:
            self._flowing = asyncio.Event()
        return self._flowing

    async def stream(
        self, rid: str, input_ids: NDArray[np.int32], sampling: Sampling, cache_salt: str
    ) -> AsyncGenerator[Delta, None]:
        """The pattern behind `input_ids`."""
        at = len(input_ids)
        end = at + sampling.max_new_tokens
        while at < end:
            await asyncio.sleep(0)
            await self._gate.wait()
            until = min(at + sampling.stream_interval, end)
            finish = Finish.LENGTH if until == end else None
            yield Delta(TOKENS[at:until].copy(), LOGPROBS[at:until].copy(), self._version, finish, False)
            at = until

    async def score(
        self, requests: Sequence[tuple[NDArray[np.int32], int]], cache_salts: Sequence[str] = ()
    ) -> list[Scores]:
        """The pattern of the positions asked for; everything before them is cached."""
        await asyncio.sleep(0)
        k = self._topk
        return [
            Scores(
                SCORES[start : len(ids)].copy(),
                len(ids),
                start - 1,
                TopK(TOPK_IDS[start : len(ids), :k].copy(), TOPK_LOGPROBS[start : len(ids), :k].copy()) if k else None,
            )
            for ids, start in requests
        ]

    async def pause(self, mode: str) -> dict[str, int]:
        """Streams yield nothing more; what they have yielded has arrived."""
        self._gate.clear()
        return await super().pause(mode)

    async def resume(self) -> None:
        """Streams go on with the weights that the learner has sent."""
        await super().resume()
        async with self._session.get(f"{self.url}/model_info") as response:
            self._version = (await response.json())["weight_version"]
        self._gate.set()
