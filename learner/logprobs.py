"""Log-probabilities of target tokens from hidden states, without ever holding logits for all rows.

    rows R --- chunks of C rows ---> logits [C, V/tp] (float32) ---> log p(target) [C], logsumexp [C]

The forward pass keeps one logsumexp per row; the backward pass computes each chunk's logits again. Gradients are exact.
R rows, V vocabulary, X hidden channels; V/tp is this rank's slice of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], one chunk of rows at a time, over a vocabulary split between ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RX: Tensor,
        weight_VX: Tensor,
        targets_R: Tensor,
        chunk_rows: int,
        group: dist.ProcessGroup,
        first_id: int,
    ) -> Tensor:
        logprobs_R = hidden_RX.new_zeros(hidden_RX.shape[0], dtype=torch.float32)
        logsumexp_R = torch.zeros_like(logprobs_R)
        for start in range(0, hidden_RX.shape[0], chunk_rows):
            chunk = slice(start, start + chunk_rows)
            logits_CV = (hidden_RX[chunk] @ weight_VX.T).float()
            logsumexp_R[chunk] = _logsumexp(logits_CV, group)
            logprobs_R[chunk] = _at_targets(logits_CV, targets_R[chunk] - first_id)
        if group.size() > 1 and len(logprobs_R):
            dist.all_reduce(logprobs_R, group=group)  # the target's logit lives on one rank, the others hold zero
        ctx.save_for_backward(hidden_RX, weight_VX, targets_R, logsumexp_R)
        ctx.chunk_rows, ctx.group, ctx.first_id = chunk_rows, group, first_id
        return logprobs_R - logsumexp_R

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # d log p(y) / d logits = onehot(y) - softmax
        grad_R: Tensor = grad_outputs[0]
        hidden_RX, weight_VX, targets_R, logsumexp_R = ctx.saved_tensors
        grad_hidden_RX = torch.zeros_like(hidden_RX)
        grad_weight_VX = torch.zeros_like(weight_VX, dtype=torch.float32)
        for start in range(0, hidden_RX.shape[0], ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            logits_CV = (hidden_RX[chunk] @ weight_VX.T).float()
            grad_CV = (logits_CV - logsumexp_R[chunk, None]).exp_().mul_(-grad_R[chunk, None])
            _add_at_targets(grad_CV, targets_R[chunk] - ctx.first_id, grad_R[chunk])
            grad_CV = grad_CV.to(hidden_RX.dtype)
            grad_hidden_RX[chunk] = grad_CV @ weight_VX
            grad_weight_VX += grad_CV.T @ hidden_RX[chunk]
        if ctx.group.size() > 1 and len(grad_R):
            dist.all_reduce(grad_hidden_RX, group=ctx.group)
        return grad_hidden_RX, grad_weight_VX.to(weight_VX.dtype), None, None, None, None


def _logsumexp(logits_CV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """float32[C] over the whole vocabulary."""
    if group.size() == 1:
        return logits_CV.logsumexp(-1)
    largest_C = logits_CV.amax(-1)
    dist.all_reduce(largest_C, op=dist.ReduceOp.MAX, group=group)
    total_C = (logits_CV - largest_C[:, None]).exp_().sum(-1)
    dist.all_reduce(total_C, group=group)
    return largest_C + total_C.log_()


def _at_targets(logits_CV: Tensor, columns_C: Tensor) -> Tensor:
    """float32[C]: the target's logit where this rank holds it, else 0."""
    here_C = (columns_C >= 0) & (columns_C < logits_CV.shape[1])
    picked_C = logits_CV.gather(1, columns_C.clamp(0, logits_CV.shape[1] - 1)[:, None])[:, 0]
    return picked_C.masked_fill_(~here_C, 0.0)


def _add_at_targets(grad_CV: Tensor, columns_C: Tensor, grad_C: Tensor) -> None:
    """Add grad_C at each row's target column, where this rank holds it."""
    here_C = (columns_C >= 0) & (columns_C < grad_CV.shape[1])
    columns_C = columns_C.clamp(0, grad_CV.shape[1] - 1)[:, None]
    grad_CV.scatter_add_(1, columns_C, (grad_C * here_C)[:, None])


def target_logprobs(
    hidden_RX: Tensor, head_weight: Tensor, targets_R: Tensor, *, vocab: int, chunk_rows: int, group: dist.ProcessGroup
) -> Tensor:
    """log p(target) of each row, nats: float32[R], equal on every rank of the tensor-parallel `group`.

    `hidden_RX` [R, X] is the same on all ranks of the group; `head_weight` [padded V / tp, X] is this rank's slice, of
    which rows at or past `vocab` are padding and take no part; `targets_R` int64[R] are global token ids.
    Gradients reach `hidden_RX` (whole, on every rank) and `head_weight`.
    """
    first_id = group.rank() * head_weight.shape[0]
    own_rows = min(head_weight.shape[0], vocab - first_id)
    weight_VX = head_weight if own_rows == head_weight.shape[0] else head_weight[:own_rows]
    logprobs: Tensor = _ChunkedLogprobs.apply(hidden_RX, weight_VX, targets_R, chunk_rows, group, first_id)
    return logprobs
