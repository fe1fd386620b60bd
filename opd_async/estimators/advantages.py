"""Advantage estimators: from the rewards of a step's responses to one advantage per token. Pure, numpy.

r_i reward of response i, T_i its tokens (t counts from 0), g its group: all responses to one prompt. A response without
a reward (it could not be judged) has advantage 0 and takes no part in any mean. Whatever distils is added later, by
the learner, to what comes out here: it neither scales the advantages nor is scaled with them. PPO is not here: its
advantages are `opd_async.estimators.gae`'s, made in the learner, where the critic's values are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_async.config.estimators import Estimator
from opd_async.config.learning import AdvantageSection

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]

GROUP_EPS = 1e-6
"""Added to a group's standard deviation; as in slime."""
WHITEN_EPS = 1e-8
"""Added to a step's variance."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One complete response: `group` is the same for all responses to one prompt, `reward` None where it has none,
    `tokens` may be 0. A `further` one is of an episode that another response of the group stands for: it is compared
    with the group, and takes no part in the group's mean and deviation."""

    group: int
    reward: float | None
    tokens: int
    further: bool = False


def estimate(outcomes: Sequence[Outcome], section: AdvantageSection) -> list[Float32]:
    """float32[tokens] per response, in order: the advantage of each of its tokens.

    `outcomes` are those of a whole step, with whole groups in it. All zero for the estimator `none`, and for `ppo`,
    whose advantages are made where the values are (`opd_async.estimators.gae`).
    """
    if section.estimator not in FUNCTIONS:
        return [np.zeros(outcome.tokens, np.float32) for outcome in outcomes]
    return [values.astype(np.float32) for values in FUNCTIONS[section.estimator](outcomes, section)]


def flat_groups(outcomes: Sequence[Outcome]) -> float:
    """Share of the groups whose rewards are all equal: they teach group-relative estimators nothing. 0 for no group."""
    groups = _groups(outcomes).values()
    return float(np.mean([min(known) == max(known) for known in groups])) if groups else 0.0


def group_relative(outcomes: Sequence[Outcome], section: AdvantageSection) -> list[Float64]:
    """GRPO's advantage, also that of GSPO and CISPO, which differ in the loss.

        A_it = (r_i - mean_g) / (std_g + 1e-6)            std_g with n - 1; without `normalize_std`: r_i - mean_g

    Estimates: how much better a response is than its prompt's others. The mean is a baseline that takes r_i along,
    which scales the expected gradient by (n - 1) / n and leaves its direction; the division makes groups weigh alike,
    so that prompts whose rewards are nearly all equal count for more (Dr. GRPO, 2503.20783, leaves it out). A group
    without two rewards that differ has advantage 0.
    Source: DeepSeekMath (2402.03300); the standard deviation and 1e-6 as in slime.
    """
    centred = _centred(outcomes)
    if section.normalize_std:
        groups = _groups(outcomes).items()
        deviations = {group: float(np.std(known, ddof=1)) for group, known in groups if len(known) > 1}
        centred /= np.array([deviations.get(outcome.group, 0.0) + GROUP_EPS for outcome in outcomes])
    return [np.full(outcome.tokens, value) for outcome, value in zip(outcomes, centred, strict=True)]


def reinforce_plus_plus(outcomes: Sequence[Outcome], section: AdvantageSection) -> list[Float64]:
    """REINFORCE++: discounted returns, whitened over the tokens of the step; needs no groups.

        G_it = gamma^(T_i - 1 - t) r_i            A_it = (G_it - mean) / sqrt(var + 1e-8)

    Estimates: the return behind each token, with the step's mean for a baseline, in units of the step's spread; prompts
    are not told apart, so an easy prompt's responses look good.
    Source: REINFORCE++ (2501.03262), without its penalty towards a reference model inside the return: here that is a
    signal beside the advantage (`advantage.reference_kl_coef`, `learner.losses.objective`).
    """
    returns = [
        (outcome.reward or 0.0) * section.gamma ** np.arange(outcome.tokens - 1, -1, -1, dtype=np.float64)
        for outcome in outcomes
    ]
    return _whitened(outcomes, returns)


def reinforce_plus_plus_baseline(outcomes: Sequence[Outcome], section: AdvantageSection) -> list[Float64]:
    """REINFORCE++ with the group's mean for a baseline, whitened over the tokens of the step.

        B_it = r_i - mean_g            A_it = (B_it - mean) / sqrt(var + 1e-8)

    Estimates: as GRPO, but all groups share one scale, that of the step: those with rewards nearly equal weigh little.
    Source: REINFORCE++-baseline (2501.03262).
    """
    centred = _centred(outcomes)
    return _whitened(outcomes, [np.full(o.tokens, value) for o, value in zip(outcomes, centred, strict=True)])


def _groups(outcomes: Sequence[Outcome]) -> dict[int, list[float]]:
    """The known rewards of each group's responses, without further ones."""
    groups: dict[int, list[float]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.reward is not None and not outcome.further:
            groups[outcome.group].append(outcome.reward)
    return groups


def _centred(outcomes: Sequence[Outcome]) -> Float64:
    """float64[n]: r_i minus its group's mean; exactly 0 where a group's rewards are all equal, or none is known."""
    groups = _groups(outcomes).items()
    means = {group: float(np.mean(known)) for group, known in groups if min(known) < max(known)}
    centred = np.zeros(len(outcomes))
    for index, outcome in enumerate(outcomes):
        if outcome.reward is not None and outcome.group in means:
            centred[index] = outcome.reward - means[outcome.group]
    return centred


def _whitened(outcomes: Sequence[Outcome], values: list[Float64]) -> list[Float64]:
    """Mean 0 and variance 1 over all tokens of responses with a reward; 0 on the others.

    The variance is that of the population; slime's is divided by n - 1 instead, n tokens.
    """
    known = [value for outcome, value in zip(outcomes, values, strict=True) if outcome.reward is not None]
    flat = np.concatenate(known) if known else np.zeros(0)
    if not len(flat) or flat.min() == flat.max():
        return [np.zeros_like(value) for value in values]
    mean, scale = flat.mean(), np.sqrt(flat.var() + WHITEN_EPS)
    return [
        (value - mean) / scale if outcome.reward is not None else np.zeros_like(value)
        for outcome, value in zip(outcomes, values, strict=True)
    ]


FUNCTIONS: dict[Estimator, Callable[[Sequence[Outcome], AdvantageSection], list[Float64]]] = {
    Estimator.GRPO: group_relative,
    Estimator.GSPO: group_relative,
    Estimator.CISPO: group_relative,
    Estimator.REINFORCE_PLUS_PLUS: reinforce_plus_plus,
    Estimator.REINFORCE_PLUS_PLUS_BASELINE: reinforce_plus_plus_baseline,
}
