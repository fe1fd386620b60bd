"""How an advantage acts through the importance ratio: PPO's clip on tokens, GSPO's on responses, CISPO's weights.

R trained rows (response tokens); p the student (current weights), mu the behaviour policy that sampled; sg = no
gradient; rho = p / mu of a token, eps_low and eps_high the clip. All objectives are to be maximized, per row.

    token      min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
    sequence   the same with s_t = sg(s) p / sg(p) for rho, s = exp(mean of log p - log mu over the response)
    truncated  sg(clip(rho, 1 - eps_low, 1 + eps_high)) A log p

    mismatch tis     sg(clamp(rho, low, high)) A log p in place of `token`: the bounds of TIS, not those of the clip
    mismatch icepop  any of the three where low <= rho <= high, else 0

A is whatever one row is worth: the estimator's advantage plus the distillation signal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_async.learner.config import LossConfig


@dataclass(frozen=True, slots=True)
class Surrogate:
    """The objective of each row, float32[R], with gradient; bool[R] where the clip took a row's gradient or cut its
    weight, and where `mismatch` cut its weight or dropped it."""

    objective_R: Tensor
    clipped_R: Tensor
    gated_R: Tensor


def surrogate(
    logprobs_R: Tensor, ratio_R: Tensor, advantage_R: Tensor, sequence_R: Tensor | None, config: LossConfig
) -> Surrogate:
    """The objective that `config.ratio` and `config.mismatch` name. `ratio_R` is rho with gradient; `advantage_R`
    float32[R] has none.

    `sequence_R` int64[R], ascending, says which response a row belongs to; only `sequence` needs it, with every row of
    each response. `ValueError` without it.
    """
    if config.mismatch == "tis":
        return tis(logprobs_R, ratio_R, advantage_R, config)
    found = _of_ratio(logprobs_R, ratio_R, advantage_R, sequence_R, config)
    return icepop(found, ratio_R.detach(), config) if config.mismatch == "icepop" else found


def _of_ratio(
    logprobs_R: Tensor, ratio_R: Tensor, advantage_R: Tensor, sequence_R: Tensor | None, config: LossConfig
) -> Surrogate:
    if config.ratio == "truncated":
        return truncated(logprobs_R, ratio_R, advantage_R, config)
    if config.ratio == "sequence":
        if sequence_R is None:
            raise ValueError("the sequence ratio needs to know which rows belong together")
        ratio_R = sequence_ratio(logprobs_R, ratio_R, sequence_R)
    return clipped(ratio_R, advantage_R, config)


def clipped(ratio_R: Tensor, advantage_R: Tensor, config: LossConfig) -> Surrogate:
    """PPO's clipped surrogate, with two sides of their own and an optional bound for negative advantages.

        min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A), and for A < 0 at least c A

    Estimates: the policy gradient under the current weights for rows whose ratio is inside; a row that has moved past a
    bound in its advantage's direction pushes no further. A larger eps_high lets unlikely tokens grow. c is `dual_clip`:
    without it a negative advantage at a large ratio pulls without bound.
    Source: PPO (1707.06347); sides of their own: DAPO (2503.14476); dual clip: 1912.09729.
    """
    objective_R = ratio_R * advantage_R
    bounded_R = _within(ratio_R, config) * advantage_R
    clipped_R = bounded_R.detach() < objective_R.detach()
    objective_R = torch.minimum(objective_R, bounded_R)
    if config.dual_clip is not None:
        least_R = config.dual_clip * advantage_R
        deep_R = (advantage_R < 0) & (objective_R.detach() < least_R)
        clipped_R = clipped_R | deep_R
        objective_R = torch.where(deep_R, least_R, objective_R)
    return Surrogate(objective_R, clipped_R, torch.zeros_like(clipped_R))


def sequence_ratio(logprobs_R: Tensor, ratio_R: Tensor, sequence_R: Tensor) -> Tensor:
    """GSPO's ratio on every row, float32[R]: its value is that of the response, its gradient the row's own.

        s = exp(1 / T sum_t (log p_t - log mu_t))            s_t = sg(s) p_t / sg(p_t)

    Estimates: the weight of a response whose choice is corrected as a whole, as a geometric mean, so that one token
    cannot blow it up; a biased but even correction. With one advantage for all tokens of a response the sum of s_t A is
    GSPO's objective up to its 1 / T: the loss here is a mean over tokens, so long responses weigh more. With the
    distillation signal, which differs by token, it is the token form of the same paper: each token keeps its own
    credit, where slime's ratio of the whole response gives all of them the response's mean.
    Source: GSPO (2507.18071), equations 7 and 14.
    """
    log_ratio_R = ratio_R.detach().log()
    totals_N = log_ratio_R.new_zeros(int(sequence_R[-1]) + 1 if len(sequence_R) else 0)
    counts_N = torch.zeros_like(totals_N).index_add_(0, sequence_R, torch.ones_like(log_ratio_R))
    mean_N = totals_N.index_add_(0, sequence_R, log_ratio_R) / counts_N  # NaN where no row is, which nobody reads
    return mean_N.exp()[sequence_R] * (logprobs_R - logprobs_R.detach()).exp()


def truncated(logprobs_R: Tensor, ratio_R: Tensor, advantage_R: Tensor, config: LossConfig) -> Surrogate:
    """CISPO: the policy gradient with a truncated importance weight, through which no gradient flows.

        sg(clip(rho, 1 - eps_low, 1 + eps_high)) A log p

    Estimates: the off-policy policy gradient with weights cut at the bounds: biased where they cut, but no row ever
    loses its gradient, in particular not the rare tokens at which a response turns. The value shown is weight x A, and
    the gradient that of the formula. `eps_low` of 1 or more leaves the lower side open, as in the paper.
    Source: CISPO (MiniMax-M1, 2506.13585).
    """
    weight_R = _within(ratio_R.detach(), config)
    clipped_R = weight_R != ratio_R.detach()
    return Surrogate(_weighing(weight_R, advantage_R, logprobs_R), clipped_R, torch.zeros_like(clipped_R))


def tis(logprobs_R: Tensor, ratio_R: Tensor, advantage_R: Tensor, config: LossConfig) -> Surrogate:
    """Truncated importance sampling: a weight between two bounds, through which no gradient flows.

        sg(clamp(rho, low, high)) A log p        low 0, high 2 where nothing else is written

    Estimates: the off-policy policy gradient with weights cut at the bounds: biased where they cut, and every row keeps
    its gradient. One ratio corrects for the engine's arithmetic and for the age of the weights. There is no clip
    beside it: in slime and verl the clip acts on p / p_old, with p_old the learner's own logprob at the beginning of
    the step. That ratio is 1 in the first update on a batch, and here every batch has one update.
    Source: slime's and verl's truncated importance sampling.
    """
    low, high = config.mismatch_bounds
    weight_R = ratio_R.detach().clamp(low, high)
    gated_R = weight_R != ratio_R.detach()
    return Surrogate(_weighing(weight_R, advantage_R, logprobs_R), torch.zeros_like(gated_R), gated_R)


def icepop(found: Surrogate, ratio_R: Tensor, config: LossConfig) -> Surrogate:
    """The same objective without the rows whose ratio float32[R] lies outside the bounds: they teach nothing.

    Estimates: as `found` does, on the rows that are left. The clip goes on acting on these. The bounds are 0.5 and 5
    where nothing else is written. Source: IcePop, as in MiMo's distillation.
    """
    low, high = config.mismatch_bounds
    inside_R = (ratio_R >= low) & (ratio_R <= high)
    # not a product: 0 * inf is NaN
    return Surrogate(found.objective_R.where(inside_R, 0.0), found.clipped_R & inside_R, ~inside_R)


def _weighing(weight_R: Tensor, advantage_R: Tensor, logprobs_R: Tensor) -> Tensor:
    """float32[R]: weight x advantage, with the gradient of weight x advantage x log p."""
    return weight_R * advantage_R * (logprobs_R - logprobs_R.detach()).exp()


def _within(ratio_R: Tensor, config: LossConfig) -> Tensor:
    """The ratio between the sides that the clip has."""
    low, high = config.clip_ratio, config.clip_high if config.clip_high is not None else config.clip_ratio
    return ratio_R.clamp(
        0.0 if low is None else max(1.0 - low, 0.0),  # no ratio is below zero
        torch.inf if high is None else 1.0 + high,
    )
