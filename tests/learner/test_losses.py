"""The losses on the sampled token against enumeration over a small vocabulary, and options against hand-made values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_async.learner.config import LossConfig
from opd_async.learner.losses.sampled import (
    LossOutput,
    Rows,
    ratio,
    reverse_kl,
    reverse_kl_behaviour,
    sft,
    summed,
)

STUDENT = [2.0, 1.0, 0.5, -0.5, -1.0]
TEACHER = [1.5, 1.8, -0.2, 0.3, -1.2]
BEHAVIOUR = [1.2, 1.4, 0.8, -0.3, -0.9]
UNCLIPPED = LossConfig(clip_ratio=None)


def loss_of(logprobs: Tensor, behaviour: Tensor, teacher: Tensor, config: LossConfig, **changes: Tensor) -> LossOutput:
    advantages = changes.get("advantages", torch.zeros(len(logprobs)))
    staleness = changes.get("staleness", torch.zeros(len(logprobs), dtype=torch.int32))
    rows = Rows(
        logprobs_R=logprobs,
        behaviour_R=behaviour,
        teacher_R=teacher,
        advantages_R=advantages,
        staleness_R=staleness,
    )
    return reverse_kl(rows, config)


def expected_gradient(
    student: list[float], teacher: list[float], behaviour: list[float], config: LossConfig, loss: Any = reverse_kl
) -> Tensor:
    """E_{y ~ behaviour}[d loss(y) / d logits]: one row per token, weighted by the behaviour."""
    logits = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    mu = torch.tensor(behaviour, dtype=torch.float64).log_softmax(-1)
    q = torch.tensor(teacher, dtype=torch.float64).log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for token in range(len(student)):
        row = slice(token, token + 1)
        rows = Rows(
            logprobs_R=logits.log_softmax(-1)[row],
            behaviour_R=mu[row],
            teacher_R=q[row],
            advantages_R=torch.zeros(1),
            staleness_R=torch.zeros(1, dtype=torch.int32),
        )
        total = total + mu[token].exp() * loss(rows, config).loss
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient


def reverse_kl_gradient(student: list[float], teacher: list[float]) -> Tensor:
    """d KL(p || q) / d logits by automatic differentiation in float64."""
    logits = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    p, q = logits.log_softmax(-1), torch.tensor(teacher, dtype=torch.float64).log_softmax(-1)
    (gradient,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits)
    return gradient


def test_golden_gradient_of_the_reverse_kl() -> None:
    golden = torch.tensor([0.187063, -0.208767, 0.067641, -0.046582, 0.000644], dtype=torch.float64)
    for behaviour in (STUDENT, BEHAVIOUR):  # on- and off-policy alike
        found = expected_gradient(STUDENT, TEACHER, behaviour, UNCLIPPED)
        torch.testing.assert_close(found, golden, rtol=0.0, atol=1e-6)


def test_a_signal_of_the_behaviour_points_elsewhere_off_policy() -> None:
    """On-policy it is the reverse KL; off-policy nearly orthogonal to it on these logits."""
    exact = reverse_kl_gradient(STUDENT, TEACHER)
    on_policy = expected_gradient(STUDENT, TEACHER, STUDENT, UNCLIPPED, reverse_kl_behaviour)
    torch.testing.assert_close(on_policy, exact, rtol=0.0, atol=1e-6)
    found = expected_gradient(STUDENT, TEACHER, BEHAVIOUR, UNCLIPPED, reverse_kl_behaviour)
    ascent = torch.tensor([0.0871, 0.0534, -0.1489, 0.0214, -0.0130], dtype=torch.float64)
    torch.testing.assert_close(-found, ascent, rtol=0.0, atol=1e-4)
    assert float(torch.cosine_similarity(found, exact, dim=0)) == pytest.approx(0.111, abs=1e-3)


logits = st.lists(st.floats(-3.0, 3.0), min_size=4, max_size=4)


@settings(deadline=None, max_examples=50)
@given(student=logits, teacher=logits, behaviour=logits)
def test_the_unclipped_estimator_is_exact_off_policy(
    student: list[float], teacher: list[float], behaviour: list[float]
) -> None:
    found = expected_gradient(student, teacher, behaviour, UNCLIPPED)
    torch.testing.assert_close(found, reverse_kl_gradient(student, teacher), rtol=0.0, atol=1e-6)


def test_sft_is_the_forward_kl_on_what_the_teacher_writes() -> None:
    golden = torch.tensor(STUDENT, dtype=torch.float64).softmax(-1) - torch.tensor(TEACHER).double().softmax(-1)
    found = expected_gradient(STUDENT, TEACHER, TEACHER, LossConfig(), sft)  # clipping has no part in it
    torch.testing.assert_close(found, golden, rtol=0.0, atol=1e-6)
    own = expected_gradient(STUDENT, TEACHER, STUDENT, LossConfig(), sft)
    torch.testing.assert_close(own, torch.zeros_like(own), rtol=0.0, atol=1e-6)  # hence refused there


def test_clipping_does_nothing_on_policy() -> None:
    found = expected_gradient(STUDENT, TEACHER, STUDENT, LossConfig(clip_ratio=0.2))
    torch.testing.assert_close(found, reverse_kl_gradient(STUDENT, TEACHER), rtol=0.0, atol=1e-12)


def test_the_coefficient_scales_the_gradient_and_the_advantage_adds_to_it() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    behaviour, teacher = logprobs.detach() - 0.1, torch.tensor([-1.5, -0.5])
    output = loss_of(
        logprobs, behaviour, teacher, LossConfig(kl_coef=0.5, clip_ratio=None), advantages=torch.tensor([2.0, -1.0])
    )
    output.loss.backward()
    ratio = math.exp(0.1)
    # A = 0.5 * (log q - log p) + advantage = [-0.25 + 2, 0.75 - 1]
    torch.testing.assert_close(logprobs.grad, torch.tensor([-ratio * 1.75, -ratio * -0.25]))


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [
        (0.5, 1.0, False),
        (0.5, -1.0, True),
        (-0.5, 1.0, True),
        (-0.5, -1.0, False),
        (0.1, 1.0, True),
        (-0.1, -1.0, True),
    ],
)
def test_the_clip_stops_a_token_that_has_moved_far_enough(log_ratio: float, advantage: float, moves: bool) -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    output = loss_of(logprobs, torch.tensor([-1.0 - log_ratio]), torch.tensor([-1.0 + advantage]), LossConfig())
    output.loss.backward()
    assert logprobs.grad is not None
    assert bool(logprobs.grad.any()) is moves
    assert output.sums["clipped"][0] == (not moves)


def test_the_signal_clamp_bounds_what_one_token_can_ask_for() -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    output = loss_of(
        logprobs, logprobs.detach(), torch.tensor([-9.0, -2.0]), LossConfig(signal_clamp=3.0, clip_ratio=None)
    )
    output.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([3.0, 1.0]))
    assert output.sums["clamped"][0] == 1


def test_the_signal_is_clamped_before_it_is_weighed_and_advantages_are_not() -> None:
    """kl_coef * clamp(signal) + advantage: of a signal of -8, clamped to 3, half; behind kl_coef it would be 3."""
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    config = LossConfig(signal_clamp=3.0, kl_coef=0.5, clip_ratio=None)
    output = loss_of(
        logprobs, logprobs.detach(), torch.tensor([-9.0, 8.0]), config, advantages=torch.tensor([-7.0, 0.0])
    )
    output.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([1.5 + 7.0, -1.5]))
    assert output.sums["clamped"].tolist() == [2.0, 2.0]
    at_the_bound = loss_of(logprobs, logprobs.detach(), torch.tensor([-4.0, 2.0]), config)
    assert at_the_bound.sums["clamped"].tolist() == [0.0, 2.0]


def mismatched(log_ratios: list[float], config: LossConfig, advantage: float = 1.0) -> tuple[list[float], list[float]]:
    """The weight of each row's gradient, and how many rows were gated and clipped."""
    ratios = torch.tensor(log_ratios)
    logprobs = torch.full((len(ratios),), -1.0, requires_grad=True)
    output = loss_of(logprobs, -1.0 - ratios, logprobs.detach() + advantage, config)
    output.loss.backward()
    assert logprobs.grad is not None
    counts = [float(output.sums[name][0]) for name in ("gated", "clipped")]
    return (-logprobs.grad / advantage).tolist(), counts


def test_mismatch_gates() -> None:
    """log rho of .05, -2, 1.8, .7: bounds of slime's TIS, of IcePop, and written ones."""
    plain = [1.051271, 0.135335, 6.049647, 2.013753]
    cases = [
        (LossConfig(mismatch="none", clip_ratio=None), plain, 0),
        (LossConfig(mismatch="tis"), [1.051271, 0.135335, 2.0, 2.0], 2),
        (LossConfig(mismatch="tis", mismatch_low=0.5, mismatch_high=5.0), [1.051271, 0.5, 5.0, 2.013753], 2),
        (LossConfig(mismatch="icepop", clip_ratio=None), [1.051271, 0.0, 0.0, 2.013753], 2),
        (LossConfig(mismatch="icepop", mismatch_high=2.0, clip_ratio=None), [1.051271, 0.0, 0.0, 0.0], 3),
        (LossConfig(mismatch="icepop", mismatch_low=0.0, clip_ratio=None), [1.051271, 0.135335, 0.0, 2.013753], 1),
    ]
    for config, weights, gated in cases:
        found, counts = mismatched([0.05, -2.0, 1.8, 0.7], config)
        assert found == pytest.approx(weights, abs=1e-5), config
        assert counts == [gated, 0], config


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_tis_is_a_weight_between_its_bounds_and_no_clip_takes_its_gradient(advantage: float) -> None:
    """As slime and verl have it: min(rho, C), whatever the sign; rows far below count little, not half."""
    ratios = [1.3, 0.7, 0.01, 2.5]
    logs = [math.log(ratio) for ratio in ratios]
    found, counts = mismatched(logs, LossConfig(mismatch="tis", dual_clip=3.0), advantage)
    assert found == pytest.approx([1.3, 0.7, 0.01, 2.0], rel=1e-5)
    assert counts == [1, 0]
    # IcePop drops rows; the clip goes on acting on those that are left
    found, counts = mismatched(logs, LossConfig(mismatch="icepop"), advantage)
    expected = [0.0, 0.7, 0.0, 0.0] if advantage > 0 else [1.3, 0.0, 0.0, 2.5]
    assert found == pytest.approx(expected, rel=1e-5)
    assert counts == [1, 2 if advantage > 0 else 1]


def test_a_ratio_is_bounded_where_it_would_overflow() -> None:
    found = ratio(torch.tensor([0.0, -200.0, -1.0]), torch.tensor([-200.0, 0.0, -20.5]))
    assert found.tolist() == pytest.approx([math.exp(20.0), math.exp(-20.0), math.exp(19.5)], rel=1e-5)


@pytest.mark.parametrize("loss", [reverse_kl, reverse_kl_behaviour, sft])
def test_what_is_reported_is_exact_and_holds_no_graph(loss: Any) -> None:
    rows = Rows(
        logprobs_R=torch.tensor([-1.0, -2.0], requires_grad=True),
        behaviour_R=torch.tensor([-1.0, -2.5]),
        teacher_R=torch.tensor([-1.5, -1.0]),
        advantages_R=torch.zeros(2),
        staleness_R=torch.zeros(2, dtype=torch.int32),
    )
    output = loss(rows, UNCLIPPED)
    assert output.loss.requires_grad
    for value in [*output.sums.values(), *output.maxima.values()]:
        assert value.dtype is torch.float64 and not value.requires_grad
    # four numbers whose sum float32 cannot hold
    assert summed(torch.tensor([2.0**25, 1.0, 1.0, 1.0])).tolist() == [2.0**25 + 3, 4.0]


def test_what_is_reported() -> None:
    logprobs, behaviour = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5])
    teacher = torch.tensor([-1.5, -1.0])
    output = loss_of(logprobs, behaviour, teacher, UNCLIPPED, staleness=torch.tensor([0, 2], dtype=torch.int32))
    half = math.exp(0.5)
    assert {name: value.tolist() for name, value in output.sums.items()} == {
        "loss": [pytest.approx(0.5 - half, rel=1e-6), 2.0],
        "reverse_kl": [pytest.approx(0.5 - half * 1.0), 2.0],
        "k3": [pytest.approx(math.exp(-0.5) + 0.5 - 1.0 + half * (math.exp(1.0) - 1.0 - 1.0)), 2.0],
        "ratio": [pytest.approx(1.0 + half), 2.0],
        "squared_deviation": [pytest.approx((half - 1.0) ** 2), 2.0],
        "clipped": [0.0, 2.0],
        "gated": [0.0, 2.0],
        "clamped": [0.0, 2.0],
        "staleness": [2.0, 2.0],
    }
    assert {name: value.item() for name, value in output.maxima.items()} == {
        "ratio": pytest.approx(half),
        "staleness": 2.0,
    }


def of_tokens(student: list[float], behaviour: list[float], teacher: list[float], loss: Any) -> dict[str, float]:
    """What is reported of infinitely many tokens of `behaviour`; all three are probabilities."""
    p, mu, q = (torch.tensor(values, dtype=torch.float64).log() for values in (student, behaviour, teacher))
    total = {"reverse_kl": 0.0, "k3": 0.0}
    for token in range(len(p)):
        row = slice(token, token + 1)
        rows = Rows(
            logprobs_R=p[row],
            behaviour_R=mu[row],
            teacher_R=q[row],
            advantages_R=torch.zeros(1),
            staleness_R=torch.zeros(1, dtype=torch.int32),
        )
        sums = loss(rows, LossConfig()).sums
        total = {name: total[name] + float(mu[token].exp() * sums[name][0]) for name in total}
    return total


@pytest.mark.parametrize("loss", [reverse_kl, reverse_kl_behaviour])
def test_the_reported_kl_is_the_students_own_however_old_the_tokens_are(loss: Any) -> None:
    """Without the ratio it would be KL(mu || q) - KL(mu || p), .183 for .024 here."""
    p, mu, q = [0.6, 0.25, 0.15], [0.3, 0.3, 0.4], [0.7, 0.2, 0.1]
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert exact == pytest.approx(0.024, abs=1e-3)
    assert of_tokens(p, mu, q, loss) == {"reverse_kl": pytest.approx(exact), "k3": pytest.approx(exact)}


def test_nothing_is_reported_of_a_teacher_that_is_not_there_or_of_tokens_that_nobody_sampled() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    rows = Rows(
        logprobs_R=logprobs,
        behaviour_R=torch.tensor([-1.0, 0.0, -2.5]),  # the second one is given
        teacher_R=None,
        advantages_R=torch.ones(3),
        staleness_R=torch.zeros(3, dtype=torch.int32),
    )
    alone = reverse_kl(rows, LossConfig())
    assert not {"reverse_kl", "k3"} & set(alone.sums)
    assert float(alone.loss.detach()) == pytest.approx(-(1.0 + math.exp(-2.0) + math.exp(-0.5)))
    taught = replace(rows, teacher_R=torch.tensor([-2.0, -9.0, -1.0]))
    for has_given, count, kl in ((False, 3.0, 1.0 + 7.0 * math.exp(-2.0)), (True, 2.0, 1.0)):
        sums = reverse_kl(taught, LossConfig(given=has_given)).sums
        assert sums["reverse_kl"].tolist() == [pytest.approx(kl - 2.0 * math.exp(-0.5)), count]
        assert {name: sums[name][1] for name in ("k3", "ratio", "squared_deviation")} == dict.fromkeys(
            ("k3", "ratio", "squared_deviation"), count
        )
        assert sums["loss"][1] == sums["clipped"][1] == 3.0
    nobody = replace(taught, behaviour_R=torch.zeros(3))
    output = reverse_kl(nobody, LossConfig(given=True))
    assert output.sums["ratio"].tolist() == output.sums["reverse_kl"].tolist() == [0.0, 0.0]
    assert output.maxima["ratio"] == 0.0


def test_extreme_logprobs_stay_finite() -> None:
    logprobs = torch.tensor([-1.0, -500.0], requires_grad=True)
    output = loss_of(logprobs, torch.tensor([-500.0, -1.0]), torch.tensor([-300.0, -1.0]), LossConfig())
    output.loss.backward()
    assert all(torch.isfinite(value).all() for value in output.sums.values())
    assert logprobs.grad is not None and torch.isfinite(logprobs.grad).all()


def test_no_rows_report_zeros() -> None:
    none = torch.zeros(0, requires_grad=True)
    output = loss_of(none, torch.zeros(0), torch.zeros(0), LossConfig())
    assert not any(value.any() for value in (*output.sums.values(), *output.maxima.values()))
    output.loss.backward()
