"""Whether a scored chunk makes sense by itself, whatever came before it."""

from __future__ import annotations

import math

import numpy as np

from opd_async.estimators.topk import TopK
from opd_async.transport.messages import ScoredChunk


def well_formed(chunk: ScoredChunk, topk: int, teacher: bool, contrast: bool) -> bool:
    """Whether lengths fit, logprobs are finite and at most 0 (but for rounding), and the teacher brought what was asked
    for: its top `topk` ids of each token (0: none may come), its logprobs (`teacher` False: none may come), and those
    behind another prompt (`contrast` False: none may come).

    Given tokens come without any of this, and end nothing."""
    n = len(chunk.token_ids) if chunk.sampled else 0
    if len(chunk.behaviour_logprobs) != n or len(chunk.teacher_logprobs) != n * teacher or chunk.start < 0:
        return False
    others = chunk.contrast_logprobs if chunk.contrast_logprobs is not None else chunk.behaviour_logprobs[:0]
    if len(others) != n * contrast:
        return False
    if chunk.context is not None and len(chunk.context) != chunk.prompt_tokens + chunk.start:
        return False
    if chunk.reward is not None and not math.isfinite(chunk.reward):
        return False
    if not chunk.sampled:
        return bool(len(chunk.token_ids)) and chunk.finish is None and chunk.topk_ids is None
    if n == 0:
        return chunk.finish is not None
    return _topk_fits(chunk, n, topk) and all(
        bool(np.isfinite(values).all()) and float(values.max(initial=-np.inf)) <= 1e-3
        for values in (chunk.behaviour_logprobs, chunk.teacher_logprobs, others)
    )


def _topk_fits(chunk: ScoredChunk, n: int, k: int) -> bool:
    """Whether the chunk brings the teacher's top-k of its n tokens if, and only if, that was asked for."""
    topk = TopK.of(chunk.topk_ids, chunk.topk_logprobs)
    if not k or topk is None:
        return not k and chunk.topk_ids is None and chunk.topk_logprobs is None
    return topk.ids.shape == (n, k) and topk.problem() is None
