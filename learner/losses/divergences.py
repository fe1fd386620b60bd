"""Divergences between student and teacher on the teacher's k most likely tokens, and on what is left.

S the support: the teacher's k most likely ids of each row; p, q the probabilities of student (current weights) and
teacher; the tail is everything outside S, one cell of probability 1 - sum_S p, respectively 1 - sum_S q.
K = k ids, D = k + 1 cells (S, then the tail). All are nats per row, float32[R], with exact gradients in p.

None of them looks at the sampled token (`minillm_topk` adds a part that does): each is a function of the prefix alone.
So no importance ratio belongs to them, and an old token costs no correctness at its own position: all that staleness
changes is which prefixes are trained (those of older weights, and of a student that has since moved). The sampled
token's teacher logprob is only reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_async.learner.config import LossConfig

TAIL_FLOOR = 1e-7
"""Smallest teacher tail: below it, float32 logprobs of the support do not tell one tail from another."""


@dataclass(frozen=True, slots=True)
class Cells:
    """Student and teacher on the support of each row; float32, nats."""

    student_RK: Tensor
    """log p of S, with gradient."""
    student_tail_R: Tensor | None
    """log(1 - sum_S p), with gradient; None for divergences that do not use it."""
    teacher_RK: Tensor
    """log q of S."""

    def with_tail(self) -> tuple[Tensor, Tensor]:
        """log p and log q of all cells: float32[R, D] each."""
        assert self.student_tail_R is not None
        student_RD = torch.cat([self.student_RK, self.student_tail_R[:, None]], 1)
        return student_RD, torch.cat([self.teacher_RK, tail_logprob(self.teacher_RK)[:, None]], 1)


def tail_logprob(logprobs_RK: Tensor) -> Tensor:
    """log(1 - sum exp(logprobs)), at least log(TAIL_FLOOR): float32[R]. No gradient is meant to pass."""
    inside_R = logprobs_RK.double().logsumexp(-1).clamp(max=math.log1p(-TAIL_FLOOR))
    return torch.log(-torch.expm1(inside_R)).float()


def forward_kl_topk(cells: Cells, config: LossConfig) -> Tensor:
    """KL(q || p) over S and the tail.

        sum_S q (log q - log p) + (1 - Q_S) log((1 - Q_S) / (1 - P_S))

    Estimates: a lower bound of the full forward KL (cells are sums of tokens), equal in its gradient on S: p - q; the
    mass outside S is pushed as a whole. Zero, with zero gradient, exactly when p = q on every cell. Without the tail
    term it would not be: the student would sharpen into S.
    Source: GKD (2306.13649) with D = forward KL; the tail bucket as in TRL. Staleness: prefixes only (see the module).
    On the wire: top-k ids and logprobs of the teacher, 8 k bytes per token.
    """
    student_RD, teacher_RD = cells.with_tail()
    return (teacher_RD.exp() * (teacher_RD - student_RD)).sum(-1)


def reverse_kl_topk(cells: Cells, config: LossConfig) -> Tensor:
    """KL(p || q) over S alone, corrected for the truncation.

        sum_S (p log(p / q) - p + q)

    Estimates: the part of the full reverse KL that S carries, as a Bregman divergence of unnormalised masses: never
    negative, zero with zero gradient when p = q on S. Its gradient is that of sum_S sg(p log(p / q)) log p. The plain
    sum of p log(p / q) lacks the -p, which cancels only over a whole vocabulary, and drains S even at p = q.
    It hardly holds back mass outside S: with p = P_S q / Q_S on S and Q_S near 1 the loss is about (1 - P_S)^2 / 2.
    Source: the corrected truncation of MOPD (MiMo). Staleness: prefixes only (see the module).
    On the wire: top-k ids and logprobs of the teacher, 8 k bytes per token.
    """
    student_RK, teacher_RK = cells.student_RK, cells.teacher_RK
    probability_RK = student_RK.exp()
    return (probability_RK * (student_RK - teacher_RK) - probability_RK + teacher_RK.exp()).sum(-1)


def jsd_topk(cells: Cells, config: LossConfig) -> Tensor:
    """Generalised Jensen-Shannon divergence over S and the tail; not the divergence of the full distributions.

        m = beta q + (1 - beta) p        beta KL(q || m) + (1 - beta) KL(p || m)        0 < beta < 1

    Estimates: a lower bound of the full JSD(beta) (cells are sums of tokens). It is at most the entropy of
    (beta, 1 - beta), so one bad prefix pulls no more than that. Divided by beta it tends to the forward KL as beta goes
    to 0, divided by 1 - beta to the reverse KL as beta goes to 1: the gradient shrinks with them.
    Source: GKD (2306.13649), in whose notation beta weights the teacher. Staleness: prefixes only (see the module).
    On the wire: top-k ids and logprobs of the teacher, 8 k bytes per token.
    """
    student_RD, teacher_RD = cells.with_tail()
    beta = config.jsd_beta
    mixture_RD = torch.logaddexp(teacher_RD + math.log(beta), student_RD + math.log1p(-beta))
    from_teacher_R = (teacher_RD.exp() * (teacher_RD - mixture_RD)).sum(-1)
    from_student_R = (student_RD.exp() * (student_RD - mixture_RD)).sum(-1)
    return beta * from_teacher_R + (1.0 - beta) * from_student_R


def minillm_topk(cells: Cells, config: LossConfig) -> Tensor:
    """The single-step part of MiniLLM's gradient: KL(p || q) over S and the tail. The long part is `long_returns`.

        sum_S p (log p - log q) + (1 - P_S) log((1 - P_S) / (1 - Q_S))

    Estimates: the gradient of the reverse KL of whole responses, split as MiniLLM does (2306.08543): the expectation
    of the next token's signal is summed over cells instead of sampled, the signals behind it are a return R_t+1 that
    weighs the sampled token. MiniLLM sums over the whole vocabulary; here the tail is one cell, so the first part is a
    lower bound. The return is the mean of the later signals, not their sum (length normalisation: without it, long
    responses are punished for being long), which gives up exactness for responses of more than two tokens.
    Staleness: the first part as in the module's docstring; the return is that of older weights' continuations, and the
    importance ratio, clipped, corrects the choice of the token alone. Needs whole responses (`train_on: samples`).
    On the wire: top-k ids and logprobs of the teacher, 8 k bytes per token, and its logprob of the sampled token.
    """
    student_RD, teacher_RD = cells.with_tail()
    return (student_RD.exp() * (student_RD - teacher_RD)).sum(-1)


def long_returns(signal_R: Tensor, sequence_R: Tensor) -> Tensor:
    """The mean of a sequence's later signals at each of its rows, 0 at its last one: float32[R].

    `signal_R` float32[R], no gradient; `sequence_R` int64[R], ascending.
    """
    rows_R = torch.arange(len(signal_R), device=signal_R.device)
    end_R = torch.searchsorted(sequence_R, sequence_R, right=True)
    before_R = torch.nn.functional.pad(signal_R.double().cumsum(0), (1, 0))  # entry i: the sum of the first i signals
    return ((before_R[end_R] - before_R[rows_R + 1]) / (end_R - rows_R - 1).clamp(min=1)).float()


Divergence = Callable[[Cells, LossConfig], Tensor]

DIVERGENCES: dict[str, Divergence] = {
    "forward_kl_topk": forward_kl_topk,
    "reverse_kl_topk": reverse_kl_topk,
    "jsd_topk": jsd_topk,
    "minillm_topk": minillm_topk,
}
"""By loss."""
