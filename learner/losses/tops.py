"""The likeliest tokens of each row, of a vocabulary that is split between ranks; no gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opd_async.learner.losses.logprobs import Head, at_columns, logsumexp
from opd_async.learner.losses.products import logits


@dataclass(frozen=True, slots=True)
class RowTops:
    """What a model says of R rows; equal on every rank of the tensor-parallel group. Logprobs are float32, nats."""

    sampled_R: Tensor
    """[R], of the token that stands there."""
    ids_RK: Tensor
    """int64[R, k]: the likeliest tokens, from the likeliest down."""
    logprobs_RK: Tensor
    """[R, k], of these."""


@torch.no_grad()
def row_tops(hidden_RX: Tensor, head: Head, targets_R: Tensor, k: int) -> RowTops:
    """The k likeliest tokens of each row, or all of them where there are fewer, and log p of `targets_R` int64[R].

    `hidden_RX` [R, X] is the same on all ranks of the head's group. A chunk of rows is in memory at a time. Every rank
    finds the likeliest tokens of its slice; those of the vocabulary are among them.
    """
    rows, k = len(targets_R), min(k, head.vocab)
    sampled_R = hidden_RX.new_zeros(rows, dtype=torch.float32)
    ids_RK = targets_R.new_zeros(rows, k)
    logprobs_RK = hidden_RX.new_zeros(rows, k, dtype=torch.float32)
    for chunk in head.chunks(rows):
        logits_BV = logits(hidden_RX[chunk], head.weight_VX())
        total_B = logsumexp(logits_BV, head.group)
        sampled_R[chunk] = at_columns(logits_BV, targets_R[chunk, None] - head.first_id)[:, 0]
        values_BK, ids_BK = _largest(logits_BV, head, k)
        ids_RK[chunk], logprobs_RK[chunk] = ids_BK, values_BK - total_B[:, None]
        head.all_reduce(sampled_R[chunk])  # a view: an id's logit lives on one rank, the others hold zero
        sampled_R[chunk] -= total_B
    return RowTops(sampled_R, ids_RK, logprobs_RK)


def _largest(logits_BV: Tensor, head: Head, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row of the vocabulary, float32[B, k], and their ids, int64[B, k]."""
    held = min(k, logits_BV.shape[1])
    values_BK, columns_BK = logits_BV.topk(held, dim=-1)
    ids_BK = columns_BK + head.first_id
    ranks = head.group.size()
    if ranks == 1 or not len(logits_BV):
        return values_BK, ids_BK
    missing = (0, k - held)  # a rank may hold less of the vocabulary
    values_BK = torch.nn.functional.pad(values_BK, missing, value=-torch.inf).contiguous()
    ids_BK = torch.nn.functional.pad(ids_BK, missing).contiguous()
    every_value, every_id = ([torch.empty_like(one) for _ in range(ranks)] for one in (values_BK, ids_BK))
    dist.all_gather(every_value, values_BK, group=head.group)
    dist.all_gather(every_id, ids_BK, group=head.group)
    best_BK, at_BK = torch.cat(every_value, 1).topk(k, dim=-1)
    return best_BK, torch.cat(every_id, 1).gather(1, at_BK)
