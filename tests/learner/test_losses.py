"""The losses on the sampled token against enumeration over a small vocabulary, and options against hand-made values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_async.learner.config import LossConfig
from opd_async.learner.losses.sampled import MAXIMA, SUMS, LossOutput, Rows, reverse_kl, reverse_kl_behaviour, sft

STUDENT = [2.0, 1.0, 0.5, -0.5, -1.0]
TEACHER = [1.5, 1.8, -0.2, 0.3, -1.2]
BEHAVIOUR = [1.2, 1.4, 0.8, -0.3, -0.9]
UNCLIPPED = LossConfig(clip_ratio=None)


def loss_of(logprobs: Tensor, behaviour: Tensor, teacher: Tensor, config: LossConfig, **changes: Tensor) -> LossOutput:
    advantages = changes.get("advantages", torch.zeros(len(logprobs)))
    staleness = changes.get("staleness", torch.zeros(len(logprobs), dtype=torch.int32))
    return reverse_kl(Rows(logprobs, behaviour, teacher, advantages, staleness), config)


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
        nothing = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
        rows = Rows(logits.log_softmax(-1)[row], mu[row], q[row], *nothing)
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
    assert output.sums[SUMS.index("clipped")] == (not moves)


def test_the_signal_clamp_bounds_what_one_token_can_ask_for() -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    output = loss_of(
        logprobs, logprobs.detach(), torch.tensor([-9.0, -2.0]), LossConfig(signal_clamp=3.0, clip_ratio=None)
    )
    output.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([3.0, 1.0]))
    assert output.sums[SUMS.index("clamped")] == 1


def test_mismatch_gates() -> None:
    log_ratios = torch.tensor([0.05, -2.0, 1.8, 0.7])
    expected = {
        "none": [1.051271, 0.135335, 6.049647, 2.013753],
        "tis": [1.051271, 0.5, 5.0, 2.013753],
        "icepop": [1.051271, 0.0, 0.0, 2.013753],
    }
    for name, weights in expected.items():
        logprobs = torch.full((4,), -1.0, requires_grad=True)
        config = LossConfig(clip_ratio=None, mismatch=name)  # type: ignore[arg-type]
        output = loss_of(logprobs, -1.0 - log_ratios, torch.zeros(4), config)
        output.loss.backward()
        assert logprobs.grad is not None
        torch.testing.assert_close(-logprobs.grad, torch.tensor(weights), rtol=0.0, atol=1e-5)
        assert output.sums[SUMS.index("gated")] == (0 if name == "none" else 2)


def test_what_is_reported() -> None:
    logprobs, behaviour = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5])
    teacher = torch.tensor([-1.5, -1.0])
    output = loss_of(logprobs, behaviour, teacher, UNCLIPPED, staleness=torch.tensor([0, 2], dtype=torch.int32))
    sums = dict(zip(SUMS, output.sums.tolist(), strict=True))
    half = math.exp(0.5)
    assert sums == {
        "tokens": 2.0,
        "loss": pytest.approx(0.5 - half, rel=1e-6),
        "reverse_kl": pytest.approx(0.5 - 1.0),
        "k3": pytest.approx(math.exp(-0.5) + 0.5 - 1.0 + math.exp(1.0) - 1.0 - 1.0),
        "ratio": pytest.approx(1.0 + half),
        "squared_deviation": pytest.approx((half - 1.0) ** 2),
        "clipped": 0.0,
        "gated": 0.0,
        "clamped": 0.0,
        "staleness": 2.0,
        "student_support": 0.0,
        "teacher_support": 0.0,
        "entropy": 0.0,
        "reference_kl": 0.0,
    }
    assert dict(zip(MAXIMA, output.maxima.tolist(), strict=True)) == {"ratio": pytest.approx(half), "staleness": 2.0}


def test_extreme_logprobs_stay_finite() -> None:
    logprobs = torch.tensor([-1.0, -500.0], requires_grad=True)
    output = loss_of(logprobs, torch.tensor([-500.0, -1.0]), torch.tensor([-300.0, -1.0]), LossConfig())
    output.loss.backward()
    assert torch.isfinite(output.sums).all()
    assert logprobs.grad is not None and torch.isfinite(logprobs.grad).all()


def test_no_rows_report_zeros() -> None:
    none = torch.zeros(0, requires_grad=True)
    output = loss_of(none, torch.zeros(0), torch.zeros(0), LossConfig())
    assert not output.sums.any() and not output.maxima.any()
    output.loss.backward()
