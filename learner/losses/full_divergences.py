"""Exact divergences between student and teacher over the whole vocabulary, from the hidden states of both.

    student rows [R, X] -+
    teacher rows [R, Y] -+- chunks of B rows -> logits [B, V/tp] of both (float32) -> divergence [B], log p(y), log q(y)

Both heads run on the same few rows at a time; the forward pass keeps a few numbers per row and the backward pass
computes each chunk's logits again, so that nothing of rows x vocabulary exists beyond a chunk. Gradients are exact, and
reach the student alone. R rows, V vocabulary, V/tp this rank's slice of it, X and Y the models' hidden channels; p, q
student and teacher, z the student's logits. Values are nats per row, float32.

Each divergence is a function of the prefix, as those of `learner.divergences` are: no importance ratio belongs to it.

A teacher may have ids beyond the V of the student, of which p is 0. With Q the probability that q gives to the V:

    KL(p || q)   sum over the V of p log(p / q), exact; q is not scaled up to add up to 1
    JSD(beta)    the sum over the V, exact with beta (1 - Q) log(1 / beta) from the ids beyond, which has no gradient
    KL(q || p)   infinite, so it is that of q given the V: q / Q in place of q. Its gradient is that of the sum over the
                 V divided by Q
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_async.learner.losses.logprobs import Head, add_at_columns, at_columns, entropy_of, logsumexp
from opd_async.learner.losses.products import add_product, logits


@dataclass(frozen=True, slots=True)
class RowDivergences:
    """What the loss of a row needs, float32[R] each, nats; equal on every rank of the tensor-parallel group."""

    sampled_R: Tensor
    """log p of the sampled token, with gradient."""
    teacher_R: Tensor
    """log q of the sampled token."""
    divergence_R: Tensor
    """With gradient."""
    entropy_R: Tensor | None = None
    """Of the student's distribution; None unless asked for."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A divergence D as sums over the vocabulary; all arguments are log-probabilities float32[B, V/tp], and `beta`.

    `terms` gives this rank's parts of (D, c), float32[B] each, where c is what `gradient` needs summed up; `gradient`
    overwrites its first argument with dD/dz [B, V/tp], given c float32[B, 1] over the whole vocabulary. Where the
    teacher has ids beyond that vocabulary, q is scaled up to add up to 1 (`conditional`), or D grows by `beyond`, given
    the probability float32[R] of these ids.
    """

    terms: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    gradient: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    conditional: bool = False
    beyond: Callable[[Tensor, float], Tensor] | None = None


def _forward_kl(student_BV: Tensor, teacher_BV: Tensor, _beta: float) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum_v q (log q - log p)."""
    value_B = (teacher_BV - student_BV).mul_(teacher_BV.exp()).sum(-1)
    return value_B, torch.zeros_like(value_B)


def _forward_kl_gradient(student_BV: Tensor, teacher_BV: Tensor, _sum_B1: Tensor, _beta: float) -> Tensor:
    """dD/dz = p - q."""
    return student_BV.exp_().sub_(teacher_BV.exp())


def _reverse_kl(student_BV: Tensor, teacher_BV: Tensor, _beta: float) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum_v p (log p - log q)."""
    value_B = (student_BV - teacher_BV).mul_(student_BV.exp()).sum(-1)
    return value_B, value_B


def _reverse_kl_gradient(student_BV: Tensor, teacher_BV: Tensor, value_B1: Tensor, _beta: float) -> Tensor:
    """dD/dz = p (log p - log q - D)."""
    weight_BV = (student_BV - teacher_BV).sub_(value_B1)
    return student_BV.exp_().mul_(weight_BV)


def _mixture(student_BV: Tensor, teacher_BV: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p)."""
    return torch.logaddexp(teacher_BV + math.log(beta), student_BV + math.log1p(-beta))


def _jsd(student_BV: Tensor, teacher_BV: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p; and KL(p || m)."""
    mixture_BV = _mixture(student_BV, teacher_BV, beta)
    from_student_B = (student_BV - mixture_BV).mul_(student_BV.exp()).sum(-1)
    from_teacher_B = mixture_BV.sub_(teacher_BV).mul_(teacher_BV.exp()).sum(-1).neg_()
    return beta * from_teacher_B + (1.0 - beta) * from_student_B, from_student_B


def _jsd_gradient(student_BV: Tensor, teacher_BV: Tensor, from_student_B1: Tensor, beta: float) -> Tensor:
    """dD/dz = (1 - beta) p (log p - log m - KL(p || m)): with the parts through m, dD/dp adds up to
    (1 - beta) log(p / m)."""
    weight_BV = _mixture(student_BV, teacher_BV, beta).neg_().add_(student_BV).sub_(from_student_B1)
    return student_BV.exp_().mul_(weight_BV).mul_(1.0 - beta)


def _jsd_beyond(share_R: Tensor, beta: float) -> Tensor:
    """Where p is 0, m is beta q: beta q log(q / m) = beta q log(1 / beta)."""
    return share_R * (-beta * math.log(beta))


FORMULAS = {
    "forward_kl_full": Formula(_forward_kl, _forward_kl_gradient, conditional=True),
    "reverse_kl_full": Formula(_reverse_kl, _reverse_kl_gradient),
    "jsd_full": Formula(_jsd, _jsd_gradient, beyond=_jsd_beyond),
    "minillm_full": Formula(_reverse_kl, _reverse_kl_gradient),
}
"""By loss. Sources: GKD (2306.13649) for the first three, beta the weight of the teacher; MiniLLM (2306.08543), whose
single-step part is the reverse KL at each prefix, for the last."""


class _ChunkedDivergence(torch.autograd.Function):
    """Returns log p(y), log q(y), the divergence and the student's entropy, float32[R] each; the first and the third
    with gradient, the last None unless asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RX: Tensor,
        weight_VX: Tensor,
        teacher_RY: Tensor,
        teacher_weight_VY: Tensor,
        targets_R: Tensor,
        heads: tuple[Head, Head],
        formula: Formula,
        beta: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        head, teacher_head = heads
        entropy_R = torch.zeros(len(targets_R), device=hidden_RX.device) if entropy else None
        sums_4R = torch.zeros(4, len(targets_R), dtype=torch.float32, device=hidden_RX.device)
        # logsumexps: of the student, and of the teacher over this vocabulary and over all its ids
        normal_3R = torch.zeros_like(sums_4R[:3])
        for chunk in head.chunks(len(targets_R)):
            student_BV = logits(hidden_RX[chunk], weight_VX)
            teacher_BV = logits(teacher_RY[chunk], teacher_weight_VY)
            for row, (own, logits_BV) in enumerate(zip(heads, (student_BV, teacher_BV), strict=True)):
                sums_4R[row, chunk] = at_columns(logits_BV, targets_R[chunk, None] - own.first_id)[:, 0]
                normal_3R[row, chunk] = logsumexp(logits_BV, head.group)
            normal_3R[2, chunk] = _with_beyond(normal_3R[1, chunk], teacher_RY[chunk], teacher_head)
            student_BV -= normal_3R[0, chunk, None]
            teacher_BV -= normal_3R[1 if formula.conditional else 2, chunk, None]
            if entropy_R is not None:
                entropy_R[chunk] = entropy_of(student_BV)
            sums_4R[2, chunk], sums_4R[3, chunk] = formula.terms(student_BV, teacher_BV, beta)
        head.all_reduce(sums_4R)
        student_R, teacher_R, value_R, sum_R = sums_4R
        # slices: a list of indices would be sent to the device
        normal_2R = normal_3R[:2] if formula.conditional else normal_3R[::2]
        ctx.save_for_backward(hidden_RX, weight_VX, teacher_RY, teacher_weight_VY, targets_R, normal_2R, sum_R)
        ctx.head, ctx.formula, ctx.beta = head, formula, beta
        if formula.beyond is not None and teacher_head.beyond is not None:
            value_R = value_R + formula.beyond(-torch.expm1(normal_3R[1] - normal_3R[2]), beta)
        logq_R = teacher_R - normal_3R[2]
        if entropy_R is None:
            ctx.mark_non_differentiable(logq_R)
        else:
            head.all_reduce(entropy_R)
            ctx.mark_non_differentiable(logq_R, entropy_R)
        return student_R - normal_3R[0], logq_R, value_R.clone(), entropy_R

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """d log p(y) / dz = onehot(y) - p; the divergence as its formula says."""
        grad_sampled_R, _, grad_value_R, _ = grad_outputs
        hidden_RX, weight_VX, teacher_RY, teacher_weight_VY, targets_R, normal_2R, sum_R = ctx.saved_tensors
        grad_hidden_RX = torch.zeros_like(hidden_RX)
        grad_weight_VX = torch.zeros_like(weight_VX, dtype=torch.float32)
        for chunk in ctx.head.chunks(len(targets_R)):
            student_BV = logits(hidden_RX[chunk], weight_VX).sub_(normal_2R[0, chunk, None])
            teacher_BV = logits(teacher_RY[chunk], teacher_weight_VY).sub_(normal_2R[1, chunk, None])
            from_sampled_BV = student_BV.exp().mul_(-grad_sampled_R[chunk, None])
            add_at_columns(from_sampled_BV, targets_R[chunk, None] - ctx.head.first_id, grad_sampled_R[chunk, None])
            grad_BV = ctx.formula.gradient(student_BV, teacher_BV, sum_R[chunk, None], ctx.beta)
            grad_BV = grad_BV.mul_(grad_value_R[chunk, None]).add_(from_sampled_BV).to(hidden_RX.dtype)
            grad_hidden_RX[chunk] = grad_BV @ weight_VX
            add_product(grad_weight_VX, grad_BV, hidden_RX[chunk])
        ctx.head.all_reduce(grad_hidden_RX)
        return grad_hidden_RX, grad_weight_VX.to(weight_VX.dtype), *[None] * 7


def _with_beyond(normal_B: Tensor, teacher_BY: Tensor, head: Head) -> Tensor:
    """The teacher's logsumexp over all its ids, float32[B], from that over the student's vocabulary."""
    if head.beyond is None:
        return normal_B
    return torch.logaddexp(normal_B, logsumexp(logits(teacher_BY, head.beyond), head.group))


def row_divergences(
    hidden_RX: Tensor,
    head: Head,
    teacher_RY: Tensor,
    teacher_head: Head,
    targets_R: Tensor,
    *,
    loss: str,
    beta: float,
    entropy: bool = False,
) -> RowDivergences:
    """The divergence of `loss` (one of `FORMULAS`) at each row, and both models' log-probabilities of its target; and
    the student's `entropy` there.

    `hidden_RX` [R, X] and `teacher_RY` [R, Y], normed and ready for the heads, are the same on all ranks of the heads'
    group, which is one for both, as is the vocabulary, but for `teacher_head.beyond`; `targets_R` int64[R] are global
    token ids; 0 < `beta` < 1 is used by `jsd_full` alone. Gradients reach `hidden_RX` (whole, on every rank) and
    `head.weight`.
    """
    sampled_R, teacher_R, divergence_R, entropy_R = _ChunkedDivergence.apply(
        hidden_RX,
        head.weight_VX(),
        teacher_RY,
        teacher_head.weight_VX(),
        targets_R,
        (head, teacher_head),
        FORMULAS[loss],
        beta,
        entropy,
    )
    return RowDivergences(sampled_R=sampled_R, teacher_R=teacher_R, divergence_R=divergence_R, entropy_R=entropy_R)
