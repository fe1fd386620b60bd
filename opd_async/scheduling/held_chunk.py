"""A chunk that another intake holds, as the first one knows it: made for every chunk, so as cheap as can be."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class HeldChunk(NamedTuple):
    """Fields of `ScoredChunk` with zeros for tokens, and a mean for logprobs; the teacher's top-k is not there."""

    sample_id: int
    attempt: int
    actor: int
    prompt_id: int
    prompt_tokens: int
    start: int
    weight_version: int
    finish: str | None
    token_ids: NDArray[np.int32]
    behaviour_logprobs: NDArray[np.float32]
    teacher_logprobs: NDArray[np.float32]
    context: NDArray[np.int32]
    reward: float | None
    teacher: str
    teacher_prompt: NDArray[np.int32] | None
    contrast_prompt: NDArray[np.int32] | None
    sampled: bool
    episode: int | None
    further: NDArray[np.int64] | None
    turn_ends: NDArray[np.int32] | None
    turn_rewards: NDArray[np.float32] | None
    label: str = ""
    topk_ids: None = None
    topk_logprobs: None = None
    contrast_logprobs: None = None
    made_at: float = 0.0
    latency_s: float = 0.0
    scored_version: int | None = None

    @property
    def end(self) -> int:
        """Position after the chunk's last token."""
        return self.start + len(self.token_ids)
