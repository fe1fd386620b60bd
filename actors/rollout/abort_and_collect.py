"""Stop an SGLang server so that every token it made is known: abort what runs, and go on from there afterwards.

SGLang's own `/pause_generation` answers before its scheduler has paused, leaves sampled tokens unsent (those of its
overlapped last step, and those that wait for the next streamed event), and sends them after the weights have changed.
An aborted request, in contrast, ends its stream with all of its tokens. Once every stream has ended nothing is on its
way, and the next request of each response continues it. The prefix cache holds what was computed: a request with the
same cache key computes one token again, a request with a new key everything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from opd_async.actors.client.routed_client import GenerationClient
from opd_async.actors.rollout.generation import Generation
from opd_async.clock import Clock
from opd_async.errors import DeadlineError, EngineError

log = logging.getLogger(__name__)

ABORT_AGAIN_S = 0.25
"""A request may reach the engine after the abort that was meant for it."""


class AbortedError(EngineError):
    """The engine ended the request before the response was complete; its tokens so far are good."""


async def abort_and_collect(
    client: GenerationClient,
    open_streams: Callable[[], Sequence[Generation]],
    changed: asyncio.Condition,
    deadline_s: float,
    clock: Clock,
) -> None:
    """Abort until `open_streams()` is empty; `changed` is notified whenever that may be so.

    An engine that does not answer is asked again until its streams have broken. Raises `DeadlineError` that names the
    engine and the requests which did not end. On cancel: some requests are aborted, and go on with the next `Resume`.
    """
    try:
        async with clock.timeout(deadline_s):
            while open_streams():
                await _abort(client)
                await _wait_a_little(open_streams, changed, clock)
    except TimeoutError:
        late = ", ".join(generation.rid for generation in open_streams()[:3])
        raise DeadlineError(f"pause: {client.url} did not end its requests in {deadline_s:.0f} s: {late}") from None


async def _abort(client: GenerationClient) -> None:
    try:
        await client.abort_all()
    except EngineError as error:
        log.warning("pause: %s; waiting for its streams to break", error)


async def _wait_a_little(
    open_streams: Callable[[], Sequence[Generation]], changed: asyncio.Condition, clock: Clock
) -> None:
    try:
        async with clock.timeout(ABORT_AGAIN_S), changed:
            await changed.wait_for(lambda: not open_streams())
    except TimeoutError:
        pass
