"""Log-probabilities of chosen tokens from hidden states, without ever holding logits for all rows.

    rows R --- chunks of C rows ---> logits [C, V/tp] (float32) ---> log p(ids) [C, K], log tail [C], entropy [C]

The forward pass keeps one to three numbers per row; the backward pass computes each chunk's logits again. Gradients
are exact. R rows, K chosen ids per row (the sampled token first, then a support S of k ids where a loss has one),
V vocabulary, X hidden channels; V/tp is this rank's slice of the vocabulary. The tail is all ids outside S.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """The student's log-probabilities on the rows of a micro-batch: nats, float32, with gradient."""

    sampled_R: Tensor
    """[R], of the sampled token."""
    support_RK: Tensor | None = None
    """[R, k], of the ids of each row's support."""
    tail_R: Tensor | None = None
    """[R], of everything outside the support: log(1 - sum_S p), precise however small."""
    entropy_R: Tensor | None = None
    """[R], of the whole distribution: - sum_v p log p."""


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T) at chosen ids, one chunk of rows at a time, over a vocabulary split between ranks.

    Returns logprobs float32[R, K], and float32[R] of the tail outside ids[:, 1:] and of the entropy (None unless asked
    for).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RX: Tensor,
        weight_VX: Tensor,
        ids_RK: Tensor,
        tail: bool,
        entropy: bool,
        chunk_rows: int,
        group: dist.ProcessGroup,
        first_id: int,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logprobs_RK = hidden_RX.new_zeros(ids_RK.shape, dtype=torch.float32)
        logsumexp_R = logprobs_RK.new_zeros(len(ids_RK))
        tail_R = torch.zeros_like(logsumexp_R) if tail else None
        entropy_R = torch.zeros_like(logsumexp_R) if entropy else None
        for start in range(0, len(ids_RK), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            logits_CV = (hidden_RX[chunk] @ weight_VX.T).float()
            columns_CK = ids_RK[chunk] - first_id
            logsumexp_R[chunk] = logsumexp(logits_CV, group)
            logprobs_RK[chunk] = at_columns(logits_CV, columns_CK)
            if entropy_R is not None:
                entropy_R[chunk] = _entropy(logits_CV, logsumexp_R[chunk], group)
            if tail_R is not None:
                tail_R[chunk] = logsumexp(_without(logits_CV, columns_CK[:, 1:]), group)
        if group.size() > 1 and len(ids_RK):
            dist.all_reduce(logprobs_RK, group=group)  # an id's logit lives on one rank, the others hold zero
        ctx.save_for_backward(hidden_RX, weight_VX, ids_RK, logsumexp_R, tail_R, entropy_R)
        ctx.chunk_rows, ctx.group, ctx.first_id = chunk_rows, group, first_id
        return logprobs_RK - logsumexp_R[:, None], None if tail_R is None else tail_R - logsumexp_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """d log p(v) / d logits = onehot(v) - p; d log tail / d logits = (p restricted to the tail) / tail - p;
        d entropy / d logits = -p (log p + entropy)."""
        grad_RK, grad_tail_R, grad_entropy_R = grad_outputs
        hidden_RX, weight_VX, ids_RK, logsumexp_R, tail_R, entropy_R = ctx.saved_tensors
        total_R = grad_RK.sum(-1) if tail_R is None else grad_RK.sum(-1) + grad_tail_R
        grad_hidden_RX = torch.zeros_like(hidden_RX)
        grad_weight_VX = torch.zeros_like(weight_VX, dtype=torch.float32)
        for start in range(0, len(ids_RK), ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            logits_CV = (hidden_RX[chunk] @ weight_VX.T).float()
            columns_CK = ids_RK[chunk] - ctx.first_id
            factor_CV = -total_R[chunk, None]
            logprobs_CV = logits_CV - logsumexp_R[chunk, None]
            if entropy_R is not None:
                factor_CV = factor_CV - (logprobs_CV + entropy_R[chunk, None]) * grad_entropy_R[chunk, None]
            grad_CV = logprobs_CV.exp_().mul_(factor_CV)
            if tail_R is not None:
                shares_CV = _without(logits_CV, columns_CK[:, 1:]).sub_(tail_R[chunk, None]).exp_()
                grad_CV += shares_CV.mul_(grad_tail_R[chunk, None])
            add_at_columns(grad_CV, columns_CK, grad_RK[chunk])
            grad_CV = grad_CV.to(hidden_RX.dtype)
            grad_hidden_RX[chunk] = grad_CV @ weight_VX
            grad_weight_VX += grad_CV.T @ hidden_RX[chunk]
        if ctx.group.size() > 1 and len(ids_RK):
            dist.all_reduce(grad_hidden_RX, group=ctx.group)
        return grad_hidden_RX, grad_weight_VX.to(weight_VX.dtype), None, None, None, None, None, None


def own_slice(head_weight: Tensor, vocab: int, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """This rank's rows of an LM head [padded vocab / tp, X] without those at or past `vocab`, and the first id."""
    first_id = group.rank() * head_weight.shape[0]
    own_rows = min(head_weight.shape[0], vocab - first_id)
    return (head_weight if own_rows == head_weight.shape[0] else head_weight[:own_rows]), first_id


def logsumexp(logits_CV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """float32[C] over the whole vocabulary."""
    if group.size() == 1:
        return logits_CV.logsumexp(-1)
    largest_C = logits_CV.amax(-1)
    dist.all_reduce(largest_C, op=dist.ReduceOp.MAX, group=group)
    total_C = (logits_CV - largest_C[:, None]).exp_().sum(-1)
    dist.all_reduce(total_C, group=group)
    return largest_C + total_C.log_()


def _entropy(logits_CV: Tensor, logsumexp_C: Tensor, group: dist.ProcessGroup) -> Tensor:
    """float32[C], nats: - sum_v p log p."""
    logprobs_CV = logits_CV - logsumexp_C[:, None]
    entropy_C = -(logprobs_CV.exp() * logprobs_CV).sum(-1)
    if group.size() > 1:
        dist.all_reduce(entropy_C, group=group)
    return entropy_C


def _here(columns_CK: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which columns this rank holds (bool), and the columns made safe to index with."""
    return (columns_CK >= 0) & (columns_CK < width), columns_CK.clamp(0, width - 1)


def at_columns(logits_CV: Tensor, columns_CK: Tensor) -> Tensor:
    """float32[C, K]: the logits where this rank holds them, else 0."""
    here_CK, safe_CK = _here(columns_CK, logits_CV.shape[1])
    return logits_CV.gather(1, safe_CK).masked_fill_(~here_CK, 0.0)


def _without(logits_CV: Tensor, columns_CK: Tensor) -> Tensor:
    """`logits_CV` itself, now -inf at these columns."""
    here_CK, safe_CK = _here(columns_CK, logits_CV.shape[1])
    # a minimum with +inf leaves the columns alone that another rank holds
    limit_CK = torch.full_like(here_CK, torch.inf, dtype=logits_CV.dtype).masked_fill_(here_CK, -torch.inf)
    return logits_CV.scatter_reduce_(1, safe_CK, limit_CK, "amin")


def add_at_columns(grad_CV: Tensor, columns_CK: Tensor, grad_CK: Tensor) -> None:
    """Add grad_CK at each row's columns, where this rank holds them."""
    here_CK, safe_CK = _here(columns_CK, grad_CV.shape[1])
    grad_CV.scatter_add_(1, safe_CK, grad_CK * here_CK)


def row_logprobs(
    hidden_RX: Tensor,
    head_weight: Tensor,
    targets_R: Tensor,
    support_RK: Tensor | None = None,
    *,
    tail: bool = False,
    entropy: bool = False,
    vocab: int,
    chunk_rows: int,
    group: dist.ProcessGroup,
) -> RowLogprobs:
    """log p of each row's sampled token and, with a support, of its ids and (`tail`) of all ids outside it; and the
    `entropy` of each row's distribution.

    `hidden_RX` [R, X] is the same on all ranks of the tensor-parallel `group`; `head_weight` [padded V / tp, X] is this
    rank's slice, of which rows at or past `vocab` are padding and take no part; `targets_R` int64[R] and `support_RK`
    int64[R, k] are global token ids, those of a row's support distinct and, for `tail`, fewer than `vocab`.
    The results are equal on every rank; gradients reach `hidden_RX` (whole, on every rank) and `head_weight`.
    """
    weight_VX, first_id = own_slice(head_weight, vocab, group)
    ids_RK = targets_R[:, None] if support_RK is None else torch.cat([targets_R[:, None], support_RK], 1)
    logprobs_RK, tail_R, entropy_R = _ChunkedLogprobs.apply(
        hidden_RX, weight_VX, ids_RK, tail, entropy, chunk_rows, group, first_id
    )
    return RowLogprobs(logprobs_RK[:, 0], None if support_RK is None else logprobs_RK[:, 1:], tail_R, entropy_R)
