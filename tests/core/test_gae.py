"""Generalised advantage estimation: values by hand, the definition as a double sum, and the cases that break others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.estimators.gae import gae, whitened


def test_by_hand() -> None:
    """deltas 0.5 * 0.2 - 0.4 = -0.3, 0.5 * 0.6 - 0.2 = 0.1, 1 - 0.6 = 0.4; each carries half of the next."""
    values, sequence, rewards = np.array([0.4, 0.2, 0.6]), np.zeros(3, np.int64), np.array([0.0, 0.0, 1.0])
    found = gae(values, sequence, rewards, gamma=0.5, lam=1.0)
    np.testing.assert_allclose(found.advantages_R, [-0.15, 0.3, 0.4], atol=1e-12)
    np.testing.assert_allclose(found.returns_R, [0.25, 0.5, 1.0], atol=1e-12)
    found = gae(values, sequence, rewards, gamma=1.0, lam=0.5)
    # deltas -0.2, 0.4, 0.4
    np.testing.assert_allclose(found.advantages_R, [0.1, 0.6, 0.4], atol=1e-12)
    np.testing.assert_allclose(found.returns_R, [0.5, 0.8, 1.0], atol=1e-12)
    assert found.known_R.all()


def test_a_reward_in_the_middle_is_earned_by_what_stands_before_it() -> None:
    """Two turns of two tokens: with `lam` 1 a token has what is earned from it on, minus its value."""
    values, sequence, rewards = np.array([1.0, 2.0, 3.0, 4.0]), np.zeros(4, np.int64), np.array([0.0, 5.0, 0.0, 1.0])
    found = gae(values, sequence, rewards, gamma=1.0, lam=1.0)
    np.testing.assert_allclose(found.advantages_R, [5.0, 4.0, -2.0, -3.0], atol=1e-12)
    np.testing.assert_allclose(found.returns_R, [6.0, 6.0, 1.0, 1.0], atol=1e-12)
    found = gae(values, sequence, rewards, gamma=0.5, lam=1.0)
    np.testing.assert_allclose(found.returns_R, [2.625, 5.25, 0.5, 1.0], atol=1e-12)


def test_the_ends_of_lambda() -> None:
    """1 is reward minus value, 0 is what the next value says."""
    values, rewards = np.array([0.5, 0.25, 1.0, -1.0]), np.array([0.0, 0.0, 2.0, -1.0])
    sequence = np.array([0, 0, 0, 1])
    np.testing.assert_allclose(
        gae(values, sequence, rewards, gamma=1.0, lam=1.0).advantages_R, [1.5, 1.75, 1.0, 0.0], atol=1e-12
    )
    np.testing.assert_allclose(
        gae(values, sequence, rewards, gamma=1.0, lam=0.0).advantages_R, [-0.25, 0.75, 1.0, 0.0], atol=1e-12
    )


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float] | None]]:
    """Values of each response, and what is earned with each of its tokens; None for one that nobody has judged."""
    value = st.floats(-3.0, 3.0)
    responses = draw(st.lists(st.lists(value, max_size=6), max_size=5))
    earned = st.one_of(st.just(0.0), value)
    rewards = [draw(st.one_of(st.none(), st.lists(earned, min_size=len(r), max_size=len(r)))) for r in responses]
    return responses, rewards


@settings(max_examples=60, deadline=None)
@given(steps(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_against_the_definition(
    step: tuple[list[list[float]], list[list[float] | None]], gamma: float, lam: float
) -> None:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, each response on its own."""
    responses, rewards = step
    expected: list[float] = []
    for values, reward in zip(responses, rewards, strict=True):
        end = len(values)
        ahead = [*values, 0.0]
        deltas = [(reward[t] if reward else 0.0) + gamma * ahead[t + 1] - ahead[t] for t in range(end)]
        sums = [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, end)) for t in range(end)]
        expected += sums if reward is not None else [0.0] * end
    values_R = np.array([value for values in responses for value in values])
    sequence_R = np.repeat(np.arange(len(responses)), [len(values) for values in responses])
    earned = [[np.nan] * len(values) if reward is None else reward for values, reward in zip(*step, strict=True)]
    rewards_R = np.array([reward for one in earned for reward in one])
    found = gae(values_R, sequence_R, rewards_R, gamma=gamma, lam=lam)
    np.testing.assert_allclose(found.advantages_R, expected, atol=1e-10)
    np.testing.assert_allclose(found.returns_R, np.array(expected) + values_R, atol=1e-10)
    assert found.known_R.tolist() == [rewards[n] is not None for n in sequence_R.tolist()]


def test_whitening_leaves_out_what_has_no_reward() -> None:
    found = gae(np.array([0.0, 1.0, 7.0]), np.array([0, 1, 2]), np.array([2.0, 5.0, np.nan]), gamma=1.0, lam=1.0)
    assert found.advantages_R.tolist() == [2.0, 4.0, 0.0]
    assert whitened(found, 3.0, 1.0).tolist() == pytest.approx([-1.0, 1.0, 0.0])
    assert whitened(found, 3.0, 0.25).tolist() == pytest.approx([-2.0, 2.0, 0.0])
    # a variance of nothing, or rounded below it, leaves the epsilon: sqrt(1e-8)
    for variance in (0.0, -1e-3):
        assert whitened(found, 3.0, variance).tolist() == pytest.approx([-1e4, 1e4, 0.0])
    assert whitened(found, 3.0, 0.0)[2] == 0.0
    nothing = gae(np.zeros(0), np.zeros(0, np.int64), np.zeros(0), gamma=1.0, lam=1.0)
    assert len(nothing.advantages_R) == len(whitened(nothing, 0.0, 0.0)) == 0
