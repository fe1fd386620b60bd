"""Small messages for the tests of the scheduling state machines."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_async.scheduling.assembly import Assembler, Verdict
from opd_async.transport.messages import Chunk, Frontier, ScoredChunk

PROMPT = np.array([7, 8], np.int32)


def token_ids(start: int, end: int) -> NDArray[np.int32]:
    """int32[end - start]: token at position p is 100 + p."""
    return np.arange(100 + start, 100 + end, dtype=np.int32)


def context_to(start: int) -> NDArray[np.int32]:
    """int32[2 + start]: the prompt and the response before `start`."""
    return np.concatenate([PROMPT, token_ids(0, start)])


def chunk(sample_id: int, start: int, end: int, **fields: Any) -> Chunk:
    """An unscored chunk of positions [start, end)."""
    count = end - start
    values: dict[str, Any] = {
        "sample_id": sample_id,
        "attempt": 0,
        "actor": 0,
        "prompt_id": 1,
        "prompt_tokens": len(PROMPT),
        "start": start,
        "weight_version": 0,
        "finish": None,
        "label": "x",
        "made_at": 0.0,
        "token_ids": token_ids(start, end),
        "behaviour_logprobs": np.full(count, -0.5, np.float32),
    }
    return Chunk(**values | fields)


def scored(sample_id: int, start: int, end: int, context: bool = False, **fields: Any) -> ScoredChunk:
    """A scored chunk of positions [start, end), with its context if asked for."""
    count = end - start
    values: dict[str, Any] = {
        "sample_id": sample_id,
        "attempt": 0,
        "actor": 0,
        "prompt_id": 1,
        "prompt_tokens": len(PROMPT),
        "start": start,
        "weight_version": 0,
        "finish": None,
        "label": "x",
        "teacher_id": "teacher-0",
        "latency_s": 0.0,
        "token_ids": token_ids(start, end),
        "behaviour_logprobs": np.full(count, -0.5, np.float32),
        "teacher_logprobs": np.full(count, -0.25, np.float32),
        "context": context_to(start) if context else None,
    }
    return ScoredChunk(**values | fields)


def held(assembler: Assembler, sample_id: int, end: int, finish: str | None = None, **fields: Any) -> None:
    """Give the assembler everything of a sample up to `end`."""
    sample = assembler.samples.get(sample_id)
    start = sample.scored_end if sample is not None else 0
    verdict = assembler.add(scored(sample_id, start, end, context=start == 0, finish=finish, **fields))
    assert verdict is Verdict.ACCEPTED


def frontier_of(
    version: int, completed: list[tuple[int, int]], partial: dict[int, list[int]] | None = None
) -> Frontier:
    """A frontier with `partial` trained tokens by sample."""
    partial = partial or {}
    return Frontier(
        version,
        np.array(completed, np.int64).reshape(-1, 2),
        np.array(list(partial), np.int64),
        np.array([len(tokens) for tokens in partial.values()], np.int32),
        np.array([token for tokens in partial.values() for token in tokens], np.int32),
    )
