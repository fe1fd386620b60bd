"""Log-probabilities of chosen tokens from hidden states, without ever holding logits for all rows.

    rows R --- chunks of B rows ---> logits [B, V/tp] (float32) ---> log p(ids) [B, J], log tail [B], entropy [B]

The forward pass keeps one to three numbers per row; the backward pass computes each chunk's logits again. Gradients
are exact. J = 1 + k chosen ids per row: the sampled token first, then a support S of k ids where a loss has one.
V/tp is this rank's slice of the vocabulary; the tail is all ids outside S. Other suffixes: see `learner`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_async.estimators.topk import NO_LOGPROB
from opd_async.learner.losses.products import add_product, logits


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
    """[R], of the whole distribution: - sum_v p log p; without gradient where it is a figure alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """An LM head as a tensor-parallel rank holds it, and how it is run."""

    weight: Tensor
    """[padded V / tp, X]: this rank's rows."""
    vocab: int
    """Rows at or past it take no part: padding, and ids that are never sampled."""
    group: dist.ProcessGroup
    """The tensor-parallel ranks, over which the vocabulary is split."""
    chunk_rows: int
    """B: on how many rows it runs at a time."""
    beyond: Tensor | None = None
    """[U, X]: this rank's rows of ids at or past `vocab` that belong to the distribution all the same: a teacher may
    have tokens that the student has not. Only `full_divergences` looks at them; None on every rank: there are none."""

    @property
    def first_id(self) -> int:
        """The token id of this rank's first row."""
        return self.group.rank() * self.weight.shape[0]

    def weight_VX(self) -> Tensor:
        """[V/tp, X]: this rank's rows without the padding; none where all of them are."""
        return self.weight[: max(0, min(self.weight.shape[0], self.vocab - self.first_id))]

    def chunks(self, rows: int) -> Iterator[slice]:
        """The rows in turns of B."""
        for start in range(0, rows, self.chunk_rows):
            yield slice(start, start + self.chunk_rows)

    def all_reduce(self, values: Tensor) -> None:
        """Add up over the ranks of the group, in place; no collective for an empty tensor or a single rank."""
        if self.group.size() > 1 and values.numel():
            dist.all_reduce(values, group=self.group)


class Entropy(Enum):
    """What the entropy of each row's distribution is for."""

    SEEN = auto()
    """A figure: it has no gradient."""
    TRAINED = auto()
    """A part of the loss."""


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T) at chosen ids, one chunk of rows at a time, over a vocabulary split between ranks.

    Returns logprobs float32[R, J], and float32[R] of the tail outside ids[:, 1:] and of the entropy (None unless asked
    for).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RX: Tensor,
        weight_VX: Tensor,
        ids_RJ: Tensor,
        head: Head,
        tail: bool,
        entropy: Entropy | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logprobs_RJ = hidden_RX.new_zeros(ids_RJ.shape, dtype=torch.float32)
        logsumexp_R = logprobs_RJ.new_zeros(len(ids_RJ))
        tail_R = torch.zeros_like(logsumexp_R) if tail else None
        entropy_R = None if entropy is None else torch.zeros_like(logsumexp_R)
        for chunk in head.chunks(len(ids_RJ)):
            logits_BV = logits(hidden_RX[chunk], weight_VX)
            columns_BJ = ids_RJ[chunk] - head.first_id
            logsumexp_R[chunk] = logsumexp(logits_BV, head.group)
            logprobs_RJ[chunk] = at_columns(logits_BV, columns_BJ)
            if entropy_R is not None:
                entropy_R[chunk] = entropy_of(logits_BV - logsumexp_R[chunk, None])
            if tail_R is not None:
                tail_R[chunk] = logsumexp(_without(logits_BV, columns_BJ[:, 1:]), head.group)
        head.all_reduce(logprobs_RJ)  # an id's logit lives on one rank, the others hold zero
        if entropy_R is not None:
            head.all_reduce(entropy_R)
        if entropy is Entropy.SEEN:
            ctx.mark_non_differentiable(entropy_R)
        trained_R = entropy_R if entropy is Entropy.TRAINED else None
        ctx.save_for_backward(hidden_RX, weight_VX, ids_RJ, logsumexp_R, tail_R, trained_R)
        ctx.head = head
        return logprobs_RJ - logsumexp_R[:, None], None if tail_R is None else tail_R - logsumexp_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """d log p(v) / d logits = onehot(v) - p; d log tail / d logits = (p restricted to the tail) / tail - p;
        d entropy / d logits = -p (log p + entropy)."""
        grad_RJ, grad_tail_R, grad_entropy_R = grad_outputs
        hidden_RX, weight_VX, ids_RJ, logsumexp_R, tail_R, entropy_R = ctx.saved_tensors
        total_R = grad_RJ.sum(-1) if tail_R is None else grad_RJ.sum(-1) + grad_tail_R
        grad_hidden_RX = torch.zeros_like(hidden_RX)
        grad_weight_VX = torch.zeros_like(weight_VX, dtype=torch.float32)
        for chunk in ctx.head.chunks(len(ids_RJ)):
            logits_BV = logits(hidden_RX[chunk], weight_VX)
            columns_BJ = ids_RJ[chunk] - ctx.head.first_id
            factor_BV = -total_R[chunk, None]
            logprobs_BV = logits_BV - logsumexp_R[chunk, None]
            if entropy_R is not None:
                factor_BV = factor_BV - (logprobs_BV + entropy_R[chunk, None]) * grad_entropy_R[chunk, None]
            grad_BV = logprobs_BV.exp_().mul_(factor_BV)
            if tail_R is not None:
                shares_BV = _without(logits_BV, columns_BJ[:, 1:]).sub_(tail_R[chunk, None]).exp_()
                grad_BV += shares_BV.mul_(grad_tail_R[chunk, None])
            add_at_columns(grad_BV, columns_BJ, grad_RJ[chunk])
            grad_BV = grad_BV.to(hidden_RX.dtype)
            grad_hidden_RX[chunk] = grad_BV @ weight_VX
            add_product(grad_weight_VX, grad_BV, hidden_RX[chunk])
        ctx.head.all_reduce(grad_hidden_RX)
        return grad_hidden_RX, grad_weight_VX.to(weight_VX.dtype), None, None, None, None


def logsumexp(logits_BV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """float32[B] over the whole vocabulary; a rank may hold nothing of it."""
    if group.size() == 1:
        return logits_BV.logsumexp(-1)
    largest_B = logits_BV.amax(-1) if logits_BV.shape[1] else logits_BV.new_full(logits_BV.shape[:1], -torch.inf)
    dist.all_reduce(largest_B, op=dist.ReduceOp.MAX, group=group)
    total_B = (logits_BV - largest_B[:, None]).exp_().sum(-1)
    dist.all_reduce(total_B, group=group)
    return largest_B + total_B.log_()


def entropy_of(logprobs_BV: Tensor) -> Tensor:
    """float32[B], nats: - sum_v p log p over this rank's part of the vocabulary."""
    return -(logprobs_BV.exp() * logprobs_BV).sum(-1)


def _here(columns_BJ: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which columns this rank holds (bool), and the columns made safe to index with."""
    return (columns_BJ >= 0) & (columns_BJ < width), columns_BJ.clamp(0, width - 1)


def at_columns(logits_BV: Tensor, columns_BJ: Tensor) -> Tensor:
    """float32[B, J]: the logits where this rank holds them, else 0."""
    if not logits_BV.shape[1]:
        return logits_BV.new_zeros(columns_BJ.shape)
    here_BJ, safe_BJ = _here(columns_BJ, logits_BV.shape[1])
    return logits_BV.gather(1, safe_BJ).masked_fill_(~here_BJ, 0.0)


def _without(logits_BV: Tensor, columns_BJ: Tensor) -> Tensor:
    """`logits_BV` itself, now -inf at these columns."""
    if not logits_BV.shape[1]:
        return logits_BV
    here_BJ, safe_BJ = _here(columns_BJ, logits_BV.shape[1])
    # a minimum with +inf leaves the columns alone that another rank holds
    limit_BJ = torch.full_like(here_BJ, torch.inf, dtype=logits_BV.dtype).masked_fill_(here_BJ, -torch.inf)
    return logits_BV.scatter_reduce_(1, safe_BJ, limit_BJ, "amin")


def add_at_columns(grad_BV: Tensor, columns_BJ: Tensor, grad_BJ: Tensor) -> None:
    """Add grad_BJ at each row's columns, where this rank holds them."""
    if not grad_BV.shape[1]:
        return
    here_BJ, safe_BJ = _here(columns_BJ, grad_BV.shape[1])
    grad_BV.scatter_add_(1, safe_BJ, grad_BJ * here_BJ)


def row_logprobs(
    hidden_RX: Tensor,
    head: Head,
    targets_R: Tensor,
    support_RK: Tensor | None = None,
    *,
    tail: bool = False,
    entropy: Entropy | None = None,
) -> RowLogprobs:
    """log p of each row's sampled token and, with a support, of its ids and (`tail`) of all ids outside it; and, where
    `entropy` asks for it, that of each row's distribution.

    `hidden_RX` [R, X] is the same on all ranks of the head's group; `targets_R` int64[R] and `support_RK` int64[R, k]
    are global token ids, those of a row's support distinct and, for `tail`, fewer than the vocabulary. A place of the
    support that holds `NO_TOKEN` has the logprob `NO_LOGPROB`, a probability of 0, and no gradient. The results are
    equal on every rank; gradients reach `hidden_RX` (whole, on every rank) and `head.weight`.
    """
    ids_RJ = targets_R[:, None] if support_RK is None else torch.cat([targets_R[:, None], support_RK], 1)
    logprobs_RJ, tail_R, entropy_R = _ChunkedLogprobs.apply(hidden_RX, head.weight_VX(), ids_RJ, head, tail, entropy)
    return RowLogprobs(
        sampled_R=logprobs_RJ[:, 0],
        support_RK=None if support_RK is None else logprobs_RJ[:, 1:].masked_fill(support_RK < 0, NO_LOGPROB),
        tail_R=tail_R,
        entropy_R=entropy_R,
    )
