"""Advantage estimators: hand-made values, what they are invariant to, and the cases that break others."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.config.estimators import Estimator
from opd_async.config.learning import AdvantageSection
from opd_async.estimators.advantages import FUNCTIONS, Outcome, estimate, flat_groups

GROUPED = [estimator for estimator in Estimator if estimator.facts.groups]
LEARNING = list(FUNCTIONS)


def advantages(outcomes: list[Outcome], estimator: Estimator, **options: object) -> list[list[float]]:
    section = AdvantageSection.model_validate({"estimator": estimator} | options)
    found = estimate(outcomes, section)
    assert [len(values) for values in found] == [outcome.tokens for outcome in outcomes]
    assert all(values.dtype == np.float32 and np.isfinite(values).all() for values in found)
    return [values.tolist() for values in found]


TWO_GROUPS = [Outcome(0, 1.0, 2), Outcome(0, 0.0, 1), Outcome(0, 0.0, 3), Outcome(1, 5.0, 1), Outcome(1, 3.0, 2)]


@pytest.mark.parametrize("estimator", [Estimator.GRPO, Estimator.GSPO, Estimator.CISPO])
def test_group_relative(estimator: Estimator) -> None:
    found = advantages(TWO_GROUPS, estimator)
    deviation = math.sqrt(1 / 3)
    expected = [2 / 3 / deviation, -1 / 3 / deviation, -1 / 3 / deviation, 1 / math.sqrt(2), -1 / math.sqrt(2)]
    for values, outcome, value in zip(found, TWO_GROUPS, expected, strict=True):
        assert values == pytest.approx([value] * outcome.tokens, rel=1e-5)
    plain = advantages(TWO_GROUPS, estimator, normalize_std=False)
    assert [values[0] for values in plain] == pytest.approx([2 / 3, -1 / 3, -1 / 3, 1.0, -1.0])


def test_rewards_that_hardly_differ_are_divided_by_hardly_less_than_the_epsilon() -> None:
    """Rewards of 0 and 2e-6: a deviation of sqrt(2) 1e-6, and as much again nearly by the epsilon."""
    found = advantages([Outcome(0, 0.0, 1), Outcome(0, 2e-6, 1)], Estimator.GRPO)
    assert found[1][0] == pytest.approx(1.0 / (math.sqrt(2.0) + 1.0), rel=1e-5)


def test_reinforce_plus_plus_discounts_and_whitens_over_tokens() -> None:
    outcomes = [Outcome(0, 1.0, 3), Outcome(1, -1.0, 1)]
    returns = np.array([0.25, 0.5, 1.0, -1.0])
    expected = (returns - returns.mean()) / np.sqrt(returns.var() + 1e-8)
    found = advantages(outcomes, Estimator.REINFORCE_PLUS_PLUS, gamma=0.5)
    assert found[0] + found[1] == pytest.approx(expected.tolist(), rel=1e-5)


def test_reinforce_plus_plus_baseline_has_one_scale_for_all_groups() -> None:
    found = advantages(TWO_GROUPS, Estimator.REINFORCE_PLUS_PLUS_BASELINE)
    flat = np.concatenate(found)
    assert flat.mean() == pytest.approx(0.0, abs=1e-6) and flat.std() == pytest.approx(1.0, rel=1e-5)
    # the spread within groups stays as it was: 1 in the first, 2 in the second
    assert (found[3][0] - found[4][0]) / (found[0][0] - found[1][0]) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("estimator", GROUPED)
def test_one_sample_per_prompt_says_nothing_instead_of_nan(estimator: Estimator) -> None:
    """Validation refuses it; a group of which only one response could be judged is the same thing."""
    assert advantages([Outcome(0, 3.0, 2), Outcome(1, 1.0, 1)], estimator) == [[0.0, 0.0], [0.0]]
    found = advantages([Outcome(0, 3.0, 2), Outcome(0, None, 1)], estimator)
    assert found == [[0.0, 0.0], [0.0]]


@pytest.mark.parametrize("estimator", LEARNING)
def test_equal_rewards_teach_nothing(estimator: Estimator) -> None:
    outcomes = [Outcome(group, 0.1, 3) for group in (0, 0, 0, 1, 1, 1)]
    assert advantages(outcomes, estimator) == [[0.0] * 3] * 6
    assert flat_groups(outcomes) == 1.0 and flat_groups(TWO_GROUPS) == 0.0 and flat_groups([]) == 0.0


@pytest.mark.parametrize("estimator", LEARNING)
def test_an_empty_response_counts_in_its_group_and_has_no_token(estimator: Estimator) -> None:
    found = advantages([Outcome(0, 0.0, 0), Outcome(0, 1.0, 2), Outcome(0, 0.0, 2)], estimator)
    assert found[0] == [] and found[1][0] > 0 > found[2][0]
    assert advantages([Outcome(0, 0.0, 0)], estimator) == [[]]
    assert advantages([], estimator) == []
    if estimator.facts.groups:
        without = advantages([Outcome(0, 1.0, 2), Outcome(0, 0.0, 2)], estimator, normalize_std=False)
        kept = advantages([Outcome(0, 0.0, 0), Outcome(0, 1.0, 2), Outcome(0, 0.0, 2)], estimator, normalize_std=False)
        assert estimator is Estimator.REINFORCE_PLUS_PLUS_BASELINE or kept[1][0] > without[0][0]


@pytest.mark.parametrize("estimator", LEARNING)
def test_a_response_without_a_reward_is_not_one_with_a_reward_of_zero(estimator: Estimator) -> None:
    judged = [Outcome(0, 2.0, 2), Outcome(0, 1.0, 2)]
    unjudged = advantages([*judged, Outcome(0, None, 2)], estimator)
    assert unjudged[:2] == advantages(judged, estimator) and unjudged[2] == [0.0, 0.0]
    zero = advantages([*judged, Outcome(0, 0.0, 2)], estimator)
    assert zero[2][0] < 0.0 and zero[:2] != unjudged[:2]
    assert advantages([Outcome(0, None, 1), Outcome(0, None, 2)], estimator) == [[0.0], [0.0, 0.0]]


@pytest.mark.parametrize("estimator", [Estimator.NONE, Estimator.PPO])
def test_what_is_not_made_here_is_zero(estimator: Estimator) -> None:
    assert advantages(TWO_GROUPS, estimator) == [[0.0] * outcome.tokens for outcome in TWO_GROUPS]
    assert set(FUNCTIONS) == set(Estimator) - {Estimator.NONE, Estimator.PPO}


@st.composite
def steps(draw: st.DrawFn) -> list[Outcome]:
    size = draw(st.integers(2, 4))
    rewards = st.one_of(st.none(), st.integers(-3, 3).map(float))
    return [
        Outcome(g, draw(rewards), draw(st.integers(0, 4))) for g in range(draw(st.integers(1, 4))) for _ in range(size)
    ]


@settings(max_examples=60, deadline=None)
@given(steps(), st.floats(0.5, 4.0), st.floats(-5.0, 5.0), st.sampled_from(LEARNING))
def test_scale_and_order_do_not_matter(
    outcomes: list[Outcome], scale: float, shift: float, estimator: Estimator
) -> None:
    """Rewards in other units, and for group baselines from another zero, are the same advantages; so is any order."""
    moved = shift if estimator.facts.groups else 0.0
    other = [Outcome(o.group, None if o.reward is None else scale * o.reward + moved, o.tokens) for o in outcomes]
    found, scaled = advantages(outcomes, estimator), advantages(other, estimator)
    np.testing.assert_allclose(np.concatenate(scaled), np.concatenate(found), atol=1e-4)
    backwards = advantages(outcomes[::-1], estimator)[::-1]
    np.testing.assert_allclose(np.concatenate(backwards), np.concatenate(found), atol=1e-5)
