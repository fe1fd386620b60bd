"""Is this engine a sane teacher? A few tokens scored whole and in two parts must agree, and must not all be alike."""

from __future__ import annotations

import numpy as np

from actors.engine_client import EngineClient
from opd_async.errors import EngineError, RoleError

TOKENS = 12
TOLERANCE = 5e-2
"""Nats; wide enough for bfloat16 engines, far below what a wrong offset or a wrong model gives."""


async def check_teacher(client: EngineClient, vocab_size: int) -> None:
    """Score ids drawn from a fixed seed, whole and cut in the middle.

    Raises `RoleError` that names the engine: request refused, chunked scores unlike whole ones, or no variance (an
    engine that answers with constants, or with the logprobs of another text).
    """
    ids = np.random.default_rng(0).integers(0, vocab_size, TOKENS).astype(np.int32)
    middle = TOKENS // 2
    try:
        whole = (await client.score([(ids, 1)]))[0].logprobs
        head = (await client.score([(ids[:middle], 1)]))[0].logprobs
        tail = (await client.score([(ids, middle)]))[0].logprobs
    except EngineError as error:
        raise RoleError(f"{client.url}: cannot score a test text: {error}") from None
    difference = float(np.abs(np.concatenate([head, tail]) - whole).max())
    if difference > TOLERANCE:
        raise RoleError(
            f"{client.url}: scores of a text differ by {difference:.3g} nats when it is sent in two parts; "
            "its prefix cache cannot be trusted: check the engine's version and flags"
        )
    if float(whole.std()) == 0.0:
        raise RoleError(f"{client.url}: all scores of a test text are alike; is a model loaded?")
