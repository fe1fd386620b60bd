"""What null engines answer: a function of the position in the sequence, so that every token can be checked at its end.

`TOKENS` int32[N], `LOGPROBS` and `SCORES` float32[N] hold token, behaviour logprob and teacher logprob of each
position, prompt included; `TOPK_IDS` and `TOPK_LOGPROBS` [N, MOST_TOPK] the teacher's most likely ids, the same
everywhere. A prompt begins with its own id, which says later whose tokens a learner was given.
"""

from __future__ import annotations

import numpy as np

from opd_async.config.topology import ONE_TEACHER
from opd_async.data.prompts import Prompt

VOCAB_SIZE = 151_936
PROMPT_TOKENS = 64
CONTEXT_TOKENS = 20_480
PROMPTS = 16_384

_positions = np.arange(CONTEXT_TOKENS, dtype=np.int64)
TOKENS = (100 + _positions * 7_919 % 140_000).astype(np.int32)
LOGPROBS = (-0.001 - (_positions * 37 % 1_000) / 500).astype(np.float32)
SCORES = (-0.001 - (_positions * 91 % 1_000) / 500).astype(np.float32)
MOST_TOPK = 64
TOPK_IDS = np.tile(np.arange(MOST_TOPK, dtype=np.int32), (CONTEXT_TOKENS, 1))
TOPK_LOGPROBS = np.tile(-np.log(2.0) * np.arange(1, MOST_TOPK + 1), (CONTEXT_TOKENS, 1)).astype(np.float32)


def prompts(count: int = PROMPTS) -> tuple[Prompt, ...]:
    """All prompts; each is asked once. `count` is at most `VOCAB_SIZE`."""
    ids = np.tile(TOKENS[:PROMPT_TOKENS], (count, 1))
    ids[:, 0] = np.arange(count)
    return tuple(Prompt(index, ids[index], "", {}, ONE_TEACHER) for index in range(count))
