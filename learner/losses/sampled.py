"""Losses on the sampled token: the reverse KL as a policy gradient, with a clipped importance ratio; and `sft`.

R trained rows; p the student (current weights), mu the behaviour policy that sampled, q the teacher; sg = no gradient.
`learner.objective` picks the loss that the configuration names; `learner.divergences` has those on the teacher's top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_async.learner.config import LossConfig
from opd_async.learner.losses.surrogate import surrogate

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: large enough never to act on a sane ratio, small enough not to overflow


@dataclass(frozen=True, slots=True)
class Rows:
    """The R trained rows of a micro-batch. float32[R] in nats where nothing else is said; only `logprobs_R` has a
    gradient."""

    logprobs_R: Tensor
    """log p of the sampled token."""
    behaviour_R: Tensor
    """log mu, as the engine reported it."""
    teacher_R: Tensor
    """log q."""
    advantages_R: Tensor
    """The estimator's, as the learner adds it to the signal; 0 without one."""
    staleness_R: Tensor
    """int32[R], optimizer steps."""
    sequence_R: Tensor | None = None
    """int64[R], ascending: the response of each row. Only ratios of whole responses need it."""
    weights_R: Tensor | None = None
    """How often a row counts in the loss (None: once); what is reported of ratios does not look at it."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The loss of one micro-batch, summed over its rows, and sums and maxima to report (see `SUMS` and `MAXIMA`)."""

    loss: Tensor
    """float32 scalar with gradient: sum over rows, to be divided by the step's token count."""
    sums: Tensor
    """float64[len(SUMS)]"""
    maxima: Tensor
    """float64[len(MAXIMA)]"""


SUMS = (
    "tokens",
    "loss",
    "reverse_kl",
    "k3",
    "ratio",
    "squared_deviation",
    "clipped",
    "gated",
    "clamped",
    "staleness",
    "student_support",
    "teacher_support",
    "entropy",
    "reference_kl",
)
MAXIMA = ("ratio", "staleness")


def reverse_kl(rows: Rows, config: LossConfig) -> LossOutput:
    """The policy-gradient form of the reverse KL from the student to the teacher, off-policy corrected.

        A    = kl_coef * clamp(log q - sg(log p), +-signal_clamp) + advantage
        rho  = exp(clamp(log p - log mu, +-20))                          differentiable
        loss = -min(rho * A, clip(rho, 1 - eps, 1 + eps) * A)            -rho * A without a clip

    Estimates: unclipped, E_{y ~ mu}[rho * A * d log p(y)] is exactly the negative gradient of KL(p || q) at each prefix
    (AsyncOPD's estimator; A under the current weights, not those that sampled). The two-sided clip (Schulman et al.,
    2017) stops pushing a token whose probability has already moved by `clip_ratio`, which keeps the update stable
    when tokens are more than one step old. The estimator's advantage, if there is one, is added to A, and may ask for
    another form of the ratio (`learner.surrogate`): with one of a whole response, or a truncated one, the expectation
    is exact on-policy only.
    Staleness: rho corrects the choice of the token; the distribution of prefixes stays that of older weights.
    On the wire: the teacher's logprob of the sampled token.

    The mismatch gate acts on the same ratio without gradient: `tis` truncates it to [low, high], `icepop` drops rows
    outside [low, high].
    """
    return policy_gradient(rows, rows.teacher_R - rows.logprobs_R.detach(), config)


def reverse_kl_behaviour(rows: Rows, config: LossConfig) -> LossOutput:
    """slime's form of the reverse KL: an advantage fixed when the token was sampled, under PPO's clip. To compare with.

        A    = kl_coef * clamp(log q - log mu, +-signal_clamp) + advantage       mu instead of the current p
        loss = -min(rho * A, clip(rho, 1 - eps, 1 + eps) * A)

    Estimates: on-policy (p = mu) the gradient of KL(p || q), as `reverse_kl`. Off-policy it does not: the expectation
    is sum_y p(y) (log q - log mu)(y) d log p(y), the gradient of KL(p || q) - KL(p || mu), which also drives
    the student away from the weights that sampled. Source: slime's on-policy distillation (an additive KL penalty on
    the advantage). Staleness and what is on the wire: as `reverse_kl`.
    """
    return policy_gradient(rows, rows.teacher_R - rows.behaviour_R, config)


def sft(rows: Rows, config: LossConfig) -> LossOutput:
    """Supervised fine-tuning on given responses: loss = -kl_coef * log p.

    Estimates: E_{y ~ q}[-log p(y)] = KL(q || p) + H(q), so on responses that the teacher wrote its gradient is that
    of the forward KL at prefixes of the teacher, with the variance of one sample. On the student's own samples the
    gradient is zero in expectation, so validation refuses it without given responses alone.
    Source: sequence-level distillation (Kim and Rush, 2016), the off-policy baseline of GKD (2306.13649). Staleness: a
    given token has none, whatever weights it waited for. On the wire: the token; the teacher's logprob is reported.
    There is no importance ratio, so neither clip, clamp nor gate act.
    """
    output = policy_gradient(rows, torch.zeros_like(rows.teacher_R), config)
    loss = output.loss - config.kl_coef * weighted(rows.logprobs_R, rows.weights_R).sum()
    output.sums[SUMS.index("loss")] = loss.detach()
    return LossOutput(loss, output.sums, output.maxima)


def policy_gradient(rows: Rows, signal_R: Tensor, config: LossConfig) -> LossOutput:
    """The surrogate that `config.ratio` names, for any signal float32[R] without gradient."""
    advantage_R = config.kl_coef * _clamped(signal_R, config.signal_clamp) + rows.advantages_R
    ratio_R = (rows.logprobs_R - rows.behaviour_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gate_R = _gate(ratio_R.detach(), config)
    acting = surrogate(rows.logprobs_R, ratio_R, advantage_R, rows.sequence_R, config)
    loss = -weighted(gate_R * acting.objective_R, rows.weights_R).sum()
    clamped_R = signal_R.abs() > (torch.inf if config.signal_clamp is None else config.signal_clamp)
    events = (acting.clipped_R, gate_R != 1.0, clamped_R)
    sums = _sums(loss, rows.teacher_R - rows.logprobs_R.detach(), ratio_R, events, rows.staleness_R)
    return LossOutput(loss, sums, _maxima(ratio_R, rows.staleness_R))


def weighted(loss_R: Tensor, weights_R: Tensor | None) -> Tensor:
    """float32[R]: each row as often as it counts."""
    return loss_R if weights_R is None else loss_R * weights_R


def _clamped(signal_R: Tensor, bound: float | None) -> Tensor:
    return signal_R if bound is None else signal_R.clamp(-bound, bound)


def _gate(ratio_R: Tensor, config: LossConfig) -> Tensor:
    """float32[R]: the factor that turns the ratio into the ratio that the gate lets through."""
    if config.mismatch == "tis":
        return ratio_R.clamp(config.mismatch_low, config.mismatch_high) / ratio_R
    if config.mismatch == "icepop":
        return ((ratio_R >= config.mismatch_low) & (ratio_R <= config.mismatch_high)).float()
    return torch.ones_like(ratio_R)


@torch.no_grad()
def _sums(
    loss: Tensor, difference_R: Tensor, ratio_R: Tensor, events: tuple[Tensor, Tensor, Tensor], staleness_R: Tensor
) -> Tensor:
    """float64[len(SUMS)], in the order of SUMS; support, entropy and reference are not this module's.

    `events` are clipped, gated, clamped; `difference_R` = log q - log p = d; `k3` = exp(d) - d - 1 (Schulman, 2020).
    """
    difference_R, ratio_R = difference_R.double(), ratio_R.double()
    bounded_R = difference_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    nothing = ratio_R.new_zeros(())
    return torch.stack(
        [
            torch.ones_like(ratio_R).sum(),
            loss.double(),
            -difference_R.sum(),
            (bounded_R.exp() - bounded_R - 1.0).sum(),
            ratio_R.sum(),
            (ratio_R - 1.0).square().sum(),
            *(event_R.double().sum() for event_R in events),
            staleness_R.double().sum(),
            *[nothing] * 4,
        ]
    )


@torch.no_grad()
def _maxima(ratio_R: Tensor, staleness_R: Tensor) -> Tensor:
    """float64[len(MAXIMA)], in the order of MAXIMA; zero for no rows."""
    if not len(ratio_R):
        return torch.zeros(len(MAXIMA), dtype=torch.float64, device=ratio_R.device)
    return torch.stack([ratio_R.max().double(), staleness_R.max().double()])
