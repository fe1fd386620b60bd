"""Exact divergences between student and teacher over the whole vocabulary, from the hidden states of both.

    student rows [R, X] -+
    teacher rows [R, Y] -+- chunks of C rows -> logits [C, V/tp] of both (float32) -> divergence [C], log p(y), log q(y)

Both heads run on the same few rows at a time; the forward pass keeps a few numbers per row and the backward pass
computes each chunk's logits again, so that nothing of rows x vocabulary exists beyond a chunk. Gradients are exact, and
reach the student alone. R rows, V vocabulary, V/tp this rank's slice of it, X and Y the models' hidden channels; p, q
student and teacher, z the student's logits. Values are nats per row, float32.

Each divergence is a function of the prefix, as those of `learner.divergences` are: no importance ratio belongs to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opd_async.learner.losses.logprobs import add_at_columns, at_columns, logsumexp, own_slice


@dataclass(frozen=True, slots=True)
class RowDivergences:
    """What the loss of a row needs, float32[R] each, nats; equal on every rank of the tensor-parallel group."""

    sampled_R: Tensor
    """log p of the sampled token, with gradient."""
    teacher_R: Tensor
    """log q of the sampled token."""
    divergence_R: Tensor
    """With gradient."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A divergence D as sums over the vocabulary; all arguments are log-probabilities float32[C, V/tp], and `beta`.

    `terms` gives this rank's parts of (D, c), float32[C] each, where c is what `gradient` needs summed up; `gradient`
    overwrites its first argument with dD/dz [C, V/tp], given c float32[C, 1] over the whole vocabulary.
    """

    terms: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, float], Tensor]


def _forward_kl(student_CV: Tensor, teacher_CV: Tensor, _beta: float) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum_v q (log q - log p)."""
    value_C = (teacher_CV - student_CV).mul_(teacher_CV.exp()).sum(-1)
    return value_C, torch.zeros_like(value_C)


def _forward_kl_gradient(student_CV: Tensor, teacher_CV: Tensor, _sum_C1: Tensor, _beta: float) -> Tensor:
    """dD/dz = p - q."""
    return student_CV.exp_().sub_(teacher_CV.exp())


def _reverse_kl(student_CV: Tensor, teacher_CV: Tensor, _beta: float) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum_v p (log p - log q)."""
    value_C = (student_CV - teacher_CV).mul_(student_CV.exp()).sum(-1)
    return value_C, value_C


def _reverse_kl_gradient(student_CV: Tensor, teacher_CV: Tensor, value_C1: Tensor, _beta: float) -> Tensor:
    """dD/dz = p (log p - log q - D)."""
    weight_CV = (student_CV - teacher_CV).sub_(value_C1)
    return student_CV.exp_().mul_(weight_CV)


def _mixture(student_CV: Tensor, teacher_CV: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p)."""
    return torch.logaddexp(teacher_CV + math.log(beta), student_CV + math.log1p(-beta))


def _jsd(student_CV: Tensor, teacher_CV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; and KL(p || m)."""
    mixture_CV = _mixture(student_CV, teacher_CV, beta)
    from_student_C = (student_CV - mixture_CV).mul_(student_CV.exp()).sum(-1)
    from_teacher_C = mixture_CV.sub_(teacher_CV).mul_(teacher_CV.exp()).sum(-1).neg_()
    return beta * from_teacher_C + (1.0 - beta) * from_student_C, from_student_C


def _jsd_gradient(student_CV: Tensor, teacher_CV: Tensor, from_student_C1: Tensor, beta: float) -> Tensor:
    """dD/dz = (1 - beta) p (log p - log m - KL(p || m)): with the parts through m, dD/dp adds up to
    (1 - beta) log(p / m)."""
    weight_CV = _mixture(student_CV, teacher_CV, beta).neg_().add_(student_CV).sub_(from_student_C1)
    return student_CV.exp_().mul_(weight_CV).mul_(1.0 - beta)


FORMULAS = {
    "forward_kl_full": Formula(_forward_kl, _forward_kl_gradient),
    "reverse_kl_full": Formula(_reverse_kl, _reverse_kl_gradient),
    "jsd_full": Formula(_jsd, _jsd_gradient),
    "minillm_full": Formula(_reverse_kl, _reverse_kl_gradient),
}
"""By loss. Sources: GKD (2306.13649) for the first three, beta the weight of the teacher; MiniLLM (2306.08543), whose
single-step part is the reverse KL at each prefix, for the last."""


class _ChunkedDivergence(torch.autograd.Function):
    """Returns log p(y) and the divergence with gradient, log q(y) without; float32[R] each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RX: Tensor,
        weight_VX: Tensor,
        teacher_RY: Tensor,
        teacher_weight_VY: Tensor,
        targets_R: Tensor,
        formula: Formula,
        beta: float,
        chunk_rows: int,
        group: dist.ProcessGroup,
        first_id: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums_4R = torch.zeros(4, len(targets_R), dtype=torch.float32, device=hidden_RX.device)
        normal_2R = torch.zeros_like(sums_4R[:2])  # logsumexps of student and teacher
        for start in range(0, len(targets_R), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            columns_C1 = targets_R[chunk, None] - first_id
            student_CV = (hidden_RX[chunk] @ weight_VX.T).float()
            teacher_CV = (teacher_RY[chunk] @ teacher_weight_VY.T).float()
            for row, logits_CV in enumerate((student_CV, teacher_CV)):
                sums_4R[row, chunk] = at_columns(logits_CV, columns_C1)[:, 0]
                normal_2R[row, chunk] = logsumexp(logits_CV, group)
                logits_CV -= normal_2R[row, chunk, None]
            sums_4R[2, chunk], sums_4R[3, chunk] = formula.terms(student_CV, teacher_CV, beta)
        if group.size() > 1 and len(targets_R):
            dist.all_reduce(sums_4R, group=group)
        student_R, teacher_R, value_R, sum_R = sums_4R
        ctx.save_for_backward(hidden_RX, weight_VX, teacher_RY, teacher_weight_VY, targets_R, normal_2R, sum_R)
        ctx.formula, ctx.beta, ctx.chunk_rows, ctx.group, ctx.first_id = formula, beta, chunk_rows, group, first_id
        logq_R = teacher_R - normal_2R[1]
        ctx.mark_non_differentiable(logq_R)
        return student_R - normal_2R[0], logq_R, value_R.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """d log p(y) / dz = onehot(y) - p; the divergence as its formula says."""
        grad_sampled_R, _, grad_value_R = grad_outputs
        hidden_RX, weight_VX, teacher_RY, teacher_weight_VY, targets_R, normal_2R, sum_R = ctx.saved_tensors
        grad_hidden_RX = torch.zeros_like(hidden_RX)
        grad_weight_VX = torch.zeros_like(weight_VX, dtype=torch.float32)
        for start in range(0, len(targets_R), ctx.chunk_rows):
            chunk = slice(start, start + ctx.chunk_rows)
            student_CV = (hidden_RX[chunk] @ weight_VX.T).float().sub_(normal_2R[0, chunk, None])
            teacher_CV = (teacher_RY[chunk] @ teacher_weight_VY.T).float().sub_(normal_2R[1, chunk, None])
            from_sampled_CV = student_CV.exp().mul_(-grad_sampled_R[chunk, None])
            add_at_columns(from_sampled_CV, targets_R[chunk, None] - ctx.first_id, grad_sampled_R[chunk, None])
            grad_CV = ctx.formula.gradient(student_CV, teacher_CV, sum_R[chunk, None], ctx.beta)
            grad_CV = grad_CV.mul_(grad_value_R[chunk, None]).add_(from_sampled_CV).to(hidden_RX.dtype)
            grad_hidden_RX[chunk] = grad_CV @ weight_VX
            grad_weight_VX += grad_CV.T @ hidden_RX[chunk]
        if ctx.group.size() > 1 and len(targets_R):
            dist.all_reduce(grad_hidden_RX, group=ctx.group)
        return grad_hidden_RX, grad_weight_VX.to(weight_VX.dtype), *[None] * 8


def row_divergences(
    hidden_RX: Tensor,
    head_weight: Tensor,
    teacher_RY: Tensor,
    teacher_head_weight: Tensor,
    targets_R: Tensor,
    loss: str,
    *,
    beta: float,
    vocab: int,
    chunk_rows: int,
    group: dist.ProcessGroup,
) -> RowDivergences:
    """The divergence of `loss` (one of `FORMULAS`) at each row, and both models' log-probabilities of its target.

    `hidden_RX` [R, X] and `teacher_RY` [R, Y], normed and ready for the heads, are the same on all ranks of the
    tensor-parallel `group`; the head weights [padded V / tp, X] and [padded V / tp, Y] are this rank's slices, of which
    rows at or past `vocab` take no part; `targets_R` int64[R] are global token ids; 0 < `beta` < 1 is used by
    `jsd_full` alone. Gradients reach `hidden_RX` (whole, on every rank) and `head_weight`.
    """
    weight_VX, first_id = own_slice(head_weight, vocab, group)
    teacher_weight_VY, _ = own_slice(teacher_head_weight, vocab, group)
    sampled_R, teacher_R, divergence_R = _ChunkedDivergence.apply(
        hidden_RX,
        weight_VX,
        teacher_RY,
        teacher_weight_VY,
        targets_R,
        FORMULAS[loss],
        beta,
        chunk_rows,
        group,
        first_id,
    )
    return RowDivergences(sampled_R, teacher_R, divergence_R)
