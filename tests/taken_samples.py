"""What a step has taken of a sample, made up."""

from __future__ import annotations

import numpy as np

from opd_async.actors.intake.steps import Taken
from opd_async.scheduling.segments import ChunkFacts, Segment

PROMPT = np.array([7, 8, 9], np.int32)


def taken(
    sample: int, start: int, end: int, *, complete: bool = True, version: int = 0, teacher: str = "large"
) -> Taken:
    """A step's part [start, end) of a response whose token at position i is 100 + i, in one chunk."""
    positions = np.arange(start, end, dtype=np.float32)
    segment = Segment(
        sample_id=sample,
        prompt_tokens=len(PROMPT),
        start=start,
        end=end,
        complete=complete,
        token_ids=np.concatenate([PROMPT, np.arange(100, 100 + end, dtype=np.int32)]),
        behaviour_logprobs=-positions,
        teacher_logprobs=-2 * positions,
        versions=np.full(end - start, version, np.int32),
        teacher=teacher,
        chunks=(ChunkFacts(end=end, version=version, made_at=1000.0 + end, latency_s=0.5),),
    )
    return Taken(
        sample_id=sample,
        end=end,
        complete=complete,
        segment=segment,
        reward=0.25 if complete else None,
        finish="length" if complete else None,
        prompt_id=4,
    )
