"""Losses on the sampled token: the reverse KL as a policy gradient, with a clipped importance ratio; and `sft`.

R trained rows; p the student (current weights), mu the behaviour policy that sampled, q the teacher; sg = no gradient.
`learner.objective` picks the loss that the configuration names; `learner.divergences` has those on the teacher's top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_async.learner.config import LossConfig
from opd_async.learner.losses.surrogate import surrogate

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: large enough never to act on a sane ratio, small enough not to overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The R trained rows of a micro-batch. float32[R] in nats where nothing else is said; only `logprobs_R` has a
    gradient."""

    logprobs_R: Tensor
    """log p of the sampled token."""
    behaviour_R: Tensor
    """log mu, as the engine reported it."""
    teacher_R: Tensor | None
    """log q; None without a teacher."""
    advantages_R: Tensor
    """The estimator's, as the learner adds it to the signal; 0 without one."""
    staleness_R: Tensor
    """int32[R], optimizer steps."""
    sequence_R: Tensor | None = None
    """int64[R], ascending: the response of each row. Only ratios of whole responses need it."""
    frequent_R: Tensor | None = None
    """bool[R]: whether the token is one of the most frequent; None where nobody asks."""
    weights_R: Tensor | None = None
    """How often a row counts in the loss (None: once); what is reported of ratios does not look at it."""

    def signal_R(self, of_R: Tensor) -> Tensor:
        """log q minus `of_R`, float32[R], without gradient; 0 without a teacher."""
        return torch.zeros_like(self.behaviour_R) if self.teacher_R is None else self.teacher_R - of_R.detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """The loss of one micro-batch, summed over its rows, and what is reported of it, by name (`learner.metrics`)."""

    loss: Tensor
    """float32 scalar with gradient: sum over rows, to be divided by the step's token count."""
    sums: dict[str, Tensor]
    """float64[2] each: the sum over rows, and over how many rows. What was not computed is not in it."""
    maxima: dict[str, Tensor]
    """float64 scalars; 0 for no rows."""

    def plus(self, loss: Tensor, **sums: Tensor) -> LossOutput:
        """The same with a further term of the loss, summed over the same rows, and further sums."""
        total = self.loss + loss
        counted = torch.stack([total.detach().double(), self.sums["loss"][1]])
        return replace(self, loss=total, sums=self.sums | {"loss": counted} | sums)


@torch.no_grad()
def summed(values_R: Tensor, among_R: Tensor | None = None) -> Tensor:
    """float64[2]: the sum of `values_R`, and how many they are; with `among_R` bool[R], of those where it is true."""
    values_R = values_R.double()
    if among_R is None:
        among_R = torch.ones_like(values_R, dtype=torch.bool)
    # not a product: 0 * inf is NaN
    return torch.stack([values_R.where(among_R, 0.0).sum(), among_R.double().sum()])


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

    `mismatch` acts on the same ratio (`learner.losses.surrogate`): with `tis` it is a truncated weight instead of a
    clipped ratio, `icepop` drops rows.
    """
    return policy_gradient(rows, rows.signal_R(rows.logprobs_R), config)


def reverse_kl_behaviour(rows: Rows, config: LossConfig) -> LossOutput:
    """The reverse KL with an advantage fixed when the token was sampled, under PPO's clip. To compare with.

        A    = kl_coef * clamp(log q - log mu, +-signal_clamp) + advantage       mu instead of the current p
        loss = -min(rho * A, clip(rho, 1 - eps, 1 + eps) * A)

    Estimates: on-policy (p = mu) the gradient of KL(p || q), as `reverse_kl`. Off-policy it does not: the expectation
    is sum_y p(y) (log q - log mu)(y) d log p(y), the gradient of KL(p || q) - KL(p || mu), which also drives
    the student away from the weights that sampled. Source: slime's on-policy distillation under
    `--use-rollout-logprobs`, an additive KL penalty on the advantage; its default computes log p again before the step,
    in place of log mu, and has a ratio of 1. Staleness and what is on the wire: as `reverse_kl`.
    """
    return policy_gradient(rows, rows.signal_R(rows.behaviour_R), config)


def sft(rows: Rows, config: LossConfig) -> LossOutput:
    """Supervised fine-tuning on given responses: loss = -kl_coef * log p.

    Estimates: E_{y ~ q}[-log p(y)] = KL(q || p) + H(q), so on responses that the teacher wrote its gradient is that
    of the forward KL at prefixes of the teacher, with the variance of one sample. On the student's own samples the
    gradient is zero in expectation, so validation refuses it without given responses alone.
    Source: sequence-level distillation (Kim and Rush, 2016), the off-policy baseline of GKD (2306.13649). Staleness: a
    given token has none, whatever weights it waited for. On the wire: the token; the teacher's logprob is reported.
    There is no importance ratio, so neither clip, clamp nor gate act.
    """
    output = policy_gradient(rows, torch.zeros_like(rows.behaviour_R), config)
    return output.plus(-config.kl_coef * weighted(rows.logprobs_R, rows.weights_R).sum())


def policy_gradient(rows: Rows, signal_R: Tensor, config: LossConfig) -> LossOutput:
    """The surrogate that `config.ratio` and `config.mismatch` name, for any signal float32[R] without gradient."""
    advantage_R = config.kl_coef * _clamped(signal_R, config.signal_clamp) + rows.advantages_R
    ratio_R = ratio(rows.logprobs_R, rows.behaviour_R)
    acting = surrogate(rows.logprobs_R, ratio_R, advantage_R, rows.sequence_R, config)
    loss = -weighted(acting.objective_R, rows.weights_R).sum()
    clamped_R = signal_R.abs() > (torch.inf if config.signal_clamp is None else config.signal_clamp)
    sums = {
        "loss": torch.stack([loss.detach().double(), loss.new_full((), len(ratio_R), dtype=torch.float64)]),
        "clipped": summed(acting.clipped_R),
        "gated": summed(acting.gated_R),
        "clamped": summed(clamped_R),
        "staleness": summed(rows.staleness_R),
    }
    sums |= _of_sampled_tokens(rows, ratio_R.detach(), config)
    own_R = _sampled(rows, config)
    sampled_R = ratio_R if own_R is None else ratio_R.where(own_R, 0.0)  # a selection would make the host wait
    maxima = {"ratio": _largest(sampled_R), "staleness": _largest(rows.staleness_R)}
    return LossOutput(loss=loss, sums=sums, maxima=maxima)


def ratio(logprobs_R: Tensor, behaviour_R: Tensor) -> Tensor:
    """rho = p / mu, float32[R], with the gradient of `logprobs_R`."""
    return (logprobs_R - behaviour_R).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def weighted(loss_R: Tensor, weights_R: Tensor | None) -> Tensor:
    """float32[R]: each row as often as it counts."""
    return loss_R if weights_R is None else loss_R * weights_R


def _clamped(signal_R: Tensor, bound: float | None) -> Tensor:
    return signal_R if bound is None else signal_R.clamp(-bound, bound)


@torch.no_grad()
def _of_sampled_tokens(rows: Rows, ratio_R: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """What is estimated from tokens that the student sampled: its KL to the teacher, and the spread of the ratio.

        reverse_kl    rho (log p - log q)                                E_{y ~ mu} = KL(p || q) at each prefix
        k3            rho (exp(d) - d - 1), d = log q - log p            the same (Schulman, 2020)

    rho = p / mu weighs a token of older weights as the present student would have it: without it the mean is that of
    KL(mu || q) - KL(mu || p).
    """
    sampled_R = _sampled(rows, config)
    ratio_R = ratio_R.double()
    sums = {"ratio": summed(ratio_R, sampled_R), "squared_deviation": summed((ratio_R - 1.0).square(), sampled_R)}
    if rows.teacher_R is not None:
        difference_R = (rows.teacher_R - rows.logprobs_R).double()
        bounded_R = difference_R.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        sums["reverse_kl"] = summed(-ratio_R * difference_R, sampled_R)
        sums["k3"] = summed(ratio_R * (bounded_R.exp() - bounded_R - 1.0), sampled_R)
    return sums


def _sampled(rows: Rows, config: LossConfig) -> Tensor | None:
    """bool[R]: whose tokens the student sampled. Those that a data set gives have a log mu of exactly 0. None: all."""
    return rows.behaviour_R != 0.0 if config.given else None


@torch.no_grad()
def _largest(values_R: Tensor) -> Tensor:
    """float64 scalar; zero for no rows."""
    return values_R.max().double() if len(values_R) else torch.zeros((), dtype=torch.float64, device=values_R.device)
