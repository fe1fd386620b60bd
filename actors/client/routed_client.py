"""Student engines behind a router: generation goes through it, everything else to the engines themselves.

    stream                    -> router -> one of the engines
    pause, abort_all, resume  -> every engine
    top                       -> one of them

A router forwards neither aborts nor pauses, and knows nothing of weight versions.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Sequence

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.client.engine_client import EngineClient, Sampling
from opd_async.actors.client.replies import Delta, Scores
from opd_async.errors import EngineError

log = logging.getLogger(__name__)


class RoutedClient:
    """A router and the engines behind it, used like one engine that generates."""

    def __init__(self, router: EngineClient, engines: Sequence[EngineClient]) -> None:
        self.url = router.url
        self._router = router
        self._engines = tuple(engines)
        self._turns = itertools.cycle(self._engines)

    def stream(
        self, rid: str, input_ids: NDArray[np.int32], sampling: Sampling, cache_salt: str
    ) -> AsyncGenerator[Delta, None]:
        """See `EngineClient.stream`."""
        return self._router.stream(rid, input_ids, sampling, cache_salt)

    async def top(self, ids: NDArray[np.int32], start: int, k: int, cache_salt: str = "") -> Scores:
        """See `EngineClient.top`: the engines take turns, without the router. On cancel: the request is given up."""
        return await next(self._turns).top(ids, start, k, cache_salt)

    async def pause(self, mode: str) -> dict[str, int]:
        """See `EngineClient.pause`. An engine that does not answer is gone: it will send no more tokens.

        On cancel: some engines may be paused.
        """
        answers = await asyncio.gather(*(engine.pause(mode) for engine in self._engines), return_exceptions=True)
        emitted: dict[str, int] = {}
        for answer in answers:
            if isinstance(answer, EngineError):
                log.warning("pause: %s; its responses go on when it is back", answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                emitted |= answer
        return emitted

    async def abort_all(self) -> None:
        """See `EngineClient.abort_all`; every engine is told before an error is raised. On cancel: some may be."""
        calls = (engine.abort_all() for engine in self._engines)
        _raise_first(await asyncio.gather(*calls, return_exceptions=True))

    async def resume(self) -> None:
        """See `EngineClient.resume`; every engine is told before an error is raised. On cancel: some may be."""
        calls = (engine.resume() for engine in self._engines)
        _raise_first(await asyncio.gather(*calls, return_exceptions=True))


GenerationClient = EngineClient | RoutedClient
"""What a rollout actor generates with."""


def _raise_first(results: Sequence[BaseException | None]) -> None:
    for result in results:
        if result is not None:
            raise result
