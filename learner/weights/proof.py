"""Prove that an engine computes with the learner's weights: the same logprobs for the same text.

Stronger than a version label, and needed where checksums cannot be compared: SGLang hashes its own fused tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from opd_async.learner.errors import WeightSyncError
from opd_async.learner.trainer import Trainer
from opd_async.learner.weights.engine_http import EngineAddress, call
from opd_async.transport.step_batch import MicroBatch

TOKENS = 32
TOLERANCE = {"float32": 1e-3}
"""Mean difference in nats that is rounding, by dtype."""
HALF_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Proof:
    """A text, int32[N], and the learner's logprobs float32[N - 1] (nats) of all its tokens but the first."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


def make_proof(trainer: Trainer, max_tokens: int) -> Proof:
    """Logprobs of a random text of at most `max_tokens` under the current weights. All ranks call it."""
    count = min(TOKENS, max_tokens)
    ids = np.random.default_rng(trainer.version).integers(0, trainer.shape.vocab, count).astype(np.int32)
    zeros = np.zeros(count - 1, np.float32)
    batch = MicroBatch(
        token_ids=ids,
        cu_seqlens=np.array([0, count], np.int32),
        rows=np.arange(count - 1, dtype=np.int32),
        behaviour_logprobs=zeros,
        teacher_logprobs=zeros,
        advantages=zeros,
        staleness=zeros.astype(np.int32),
    )
    reports = trainer.logprobs([batch])
    logprobs_R = reports[0].detach().float() if reports else torch.zeros(count - 1, device=trainer.device)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:  # only the last stage has them
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(logprobs_R, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return Proof(ids, logprobs_R.cpu().numpy())


def check_proof(engine: EngineAddress, proof: Proof, dtypes: Sequence[str], timeout_s: float) -> float:
    """Have the engine score the text; returns the mean difference in nats.

    `dtypes` are those of learner and engine; the engine must not be paused. Raises `WeightSyncError` that names the
    engine if it cannot score or the difference is more than rounding.
    """
    body = {
        "input_ids": proof.token_ids.tolist(),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,  # nothing may come from a prefix cache
    }
    answer = call(engine, "POST", "/generate", body, timeout_s=timeout_s, admin=False) or {}
    try:
        entries = answer["meta_info"]["input_token_logprobs"][1:]
        pairs = zip([float(entry[0]) for entry in entries], proof.logprobs.tolist(), strict=True)
        difference = sum(abs(theirs - ours) for theirs, ours in pairs) / len(proof.logprobs)
    except (KeyError, TypeError, ValueError, IndexError):
        raise WeightSyncError(f"engine {engine.url} did not score the text that proves its weights") from None
    limit = max(TOLERANCE.get(dtype, HALF_TOLERANCE) for dtype in dtypes)
    if not difference <= limit:
        raise WeightSyncError(
            f"engine {engine.url} scores a text {difference:.3g} nats per token unlike the learner, at most {limit:g} "
            "is rounding: it does not compute with the weights that were sent"
        )
    return difference
