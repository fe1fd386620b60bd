"""Is this engine a sane teacher, and still the same one? A short text, scored whole and in two parts, says so.

The parts must agree with the whole (an offset by one, a cache that cannot be trusted), the scores must not all be alike
(no model behind them), the ids must come back (checked with every answer), and nothing may change while a run lasts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.client.engine_client import EngineClient
from opd_async.actors.client.replies import Scores
from opd_async.actors.teacher.live_weights import LiveWeights
from opd_async.errors import RoleError

TOKENS = 12
TOLERANCE = 5e-2
"""Nats; wide enough for bfloat16 engines, far below what a wrong offset or a wrong model gives."""


class CanaryError(RoleError):
    """The engine answers, and its scores must not be used; the message names the engine and what is wrong."""


class Canary:
    """Checks one engine, any number of times."""

    def __init__(self, client: EngineClient, vocab_size: int, live: LiveWeights | None = None) -> None:
        """`live`: the engine's weights change, so that only scores of the same ones are compared."""
        self._client = client
        self._live = live
        self._checks = 0
        self._ids = np.random.default_rng(0).integers(0, vocab_size, TOKENS).astype(np.int32)
        self._first: NDArray[np.float32] | None = None

    async def check(self) -> None:
        """Score the text. Raises `CanaryError` for an engine that cannot be trusted, `EngineError` for one that could
        not be asked. On cancel: the check did not happen."""
        scores = await self._scores()
        if self._live is not None:
            self._live.check(scores)
        whole, head, tail = (score.logprobs for score in scores)
        difference = float(np.abs(np.concatenate([head, tail]) - whole).max())
        if difference > TOLERANCE:
            raise CanaryError(
                f"{self._client.url}: scores of a text differ by {difference:.3g} nats when it is sent in two parts; "
                "its prefix cache cannot be trusted: check the engine's version and flags"
            )
        if float(whole.std()) == 0.0:
            raise CanaryError(f"{self._client.url}: all scores of a test text are alike; is a model loaded?")
        if self._first is None:
            self._first = whole
        elif self._live is None and (change := float(np.abs(whole - self._first).mean())) > TOLERANCE:
            raise CanaryError(
                f"{self._client.url}: scores of a test text have changed by {change:.3g} nats per token since the run "
                "began; a teacher must stay the same: what replaced its weights?"
            )

    async def _scores(self) -> list[Scores]:
        """Of the text, of its first half, and of its second half with the first as prefix.

        The first time one after the other, so that the last finds what the others left in the cache; later at once,
        because the cache has it, and an engine in trouble is asked one thing only. Of live weights always one after the
        other, in a cache of its own: what is left there is of older ones.
        """
        middle = TOKENS // 2
        requests = [(self._ids, 1), (self._ids[:middle], 1), (self._ids, middle)]
        self._checks += 1
        if self._live is not None:
            salts = [self._live.canary_salt(self._checks)]
            return [(await self._client.score([request], salts))[0] for request in requests]
        if self._first is None:
            return [(await self._client.score([request]))[0] for request in requests]
        return await self._client.score(requests)

    def compare(self, other: Canary) -> None:
        """Replicas of one teacher must agree. Raises `CanaryError` that names both; only after `check` of both."""
        assert self._first is not None and other._first is not None
        difference = float(np.abs(self._first - other._first).mean())
        if difference > TOLERANCE:
            raise CanaryError(
                f"{self._client.url} and {other._client.url}: scores of a test text differ by {difference:.3g} nats "
                "per token; replicas of one teacher must hold the same model"
            )
