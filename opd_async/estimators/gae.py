"""Generalised advantage estimation: rewards at some tokens of each response, and a value before each of its tokens.

R rows (response tokens) of N responses, those of a response one after the other and up to its end. Pure, numpy,
float64: the learner calls it, since the values live there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_async.estimators.advantages import WHITEN_EPS

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimates:
    """What rewards and values say about R rows."""

    advantages_R: Float64
    """Not whitened; 0 where a response has no reward."""
    returns_R: Float64
    """Advantage plus value: what the value should have been. The value itself where a response has no reward."""
    known_R: NDArray[np.bool_]
    """Whether the row's response has a reward."""


def gae(
    values_R: NDArray[np.floating],
    sequence_R: NDArray[np.integer],
    rewards_R: NDArray[np.floating],
    *,
    gamma: float,
    lam: float,
) -> Estimates:
    """The advantages and returns of rows, given the value of the prefix before each of them.

        delta_t = r_t + gamma V_{t+1} - V_t          r_t = what is earned with the token, 0 at most of them
        A_t     = delta_t + gamma lam A_{t+1}        V and A behind the last token are 0; return = A_t + V_t

    Estimates: how much better than expected a response went on from a token on. `lam` 1 takes the whole (discounted)
    reward and the value for a baseline alone: no bias, whatever the critic says. `lam` 0 trusts the critic for all that
    follows the next token. A response that was cut at its length limit ends like any other.

    `sequence_R` is ascending and says whose row it is; all rows of a response without a reward have NaN in `rewards_R`.
    Source: 1506.02438, equation 16.
    """
    lengths_N = np.bincount(sequence_R)
    behind_R = np.cumsum(lengths_N)[sequence_R] - 1 - np.arange(len(sequence_R))  # rows of the response after this one
    known_R = ~np.isnan(rewards_R)
    # by distance from the end: all responses end in line 0
    values_LN = np.zeros((int(lengths_N.max(initial=0)), len(lengths_N)))
    rewards_LN, advantages_LN = np.zeros_like(values_LN), np.zeros_like(values_LN)
    values_LN[behind_R, sequence_R], rewards_LN[behind_R, sequence_R] = values_R, rewards_R
    following_N, advantage_N = np.zeros(len(lengths_N)), np.zeros(len(lengths_N))
    for line in range(len(values_LN)):
        delta_N = gamma * following_N - values_LN[line] + rewards_LN[line]
        advantage_N = delta_N + gamma * lam * advantage_N
        advantages_LN[line], following_N = advantage_N, values_LN[line]
    advantages_R = np.where(known_R, advantages_LN[behind_R, sequence_R], 0.0)
    return Estimates(advantages_R, advantages_R + values_R, known_R)


def whitened(estimates: Estimates, mean: float, variance: float) -> NDArray[np.float32]:
    """float32[R]: the advantages in units of the step's spread, (A - mean) / sqrt(variance + 1e-8); 0 without a reward.

    `mean` and `variance` are those of all rows of the step whose response has a reward, over all ranks.
    """
    scaled_R = (estimates.advantages_R - mean) / np.sqrt(max(variance, 0.0) + WHITEN_EPS)
    return np.where(estimates.known_R, scaled_R, 0.0).astype(np.float32)
