"""The ratio's forms: values by hand, gradients against enumeration, and what on-policy makes of all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_async.learner.config import LossConfig
from opd_async.learner.losses.sampled import Rows, policy_gradient, reverse_kl
from opd_async.learner.losses.surrogate import clipped, sequence_ratio, surrogate

RATIOS = ("token", "sequence", "truncated")


def acting(
    log_ratio: list[float], advantage: list[float], sequence: list[int] | None = None, **config: object
) -> tuple[list[float], list[float], list[bool]]:
    """Per row: the objective, its derivative by log p, and whether it was clipped."""
    logprobs = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    ids = None if sequence is None else torch.tensor(sequence)
    found = surrogate(logprobs, logprobs.exp(), torch.tensor(advantage, dtype=torch.float64), ids, LossConfig(**config))  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(found.objective_R.sum(), logprobs)
    return found.objective_R.tolist(), gradient.tolist(), found.clipped_R.tolist()


def close(found: list[float], wanted: list[float]) -> None:
    assert found == pytest.approx(wanted, rel=1e-12)


def test_the_clip_has_two_sides_of_their_own() -> None:
    ratios = [1.5, 1.5, 0.5, 0.5, 1.1]
    logs = [math.log(ratio) for ratio in ratios]
    values, gradients, cut = acting(logs, [1.0, -1.0, 1.0, -1.0, 1.0], clip_ratio=0.2, clip_high=0.28)
    close(values, [1.28, -1.5, 0.5, -0.8, 1.1])
    close(gradients, [0.0, -1.5, 0.5, 0.0, 1.1])
    assert cut == [True, False, False, True, False]
    values, _, cut = acting(logs, [1.0, -1.0, 1.0, -1.0, 1.0], clip_ratio=None, clip_high=0.28)
    close(values, [1.28, -1.5, 0.5, -0.5, 1.1])
    assert cut == [True, False, False, False, False]
    values, gradients, cut = acting(logs, [1.0, -1.0, 1.0, -1.0, 1.0], clip_ratio=None)
    close(gradients, [1.5, -1.5, 0.5, -0.5, 1.1])
    assert not any(cut)


def test_dual_clip_bounds_what_a_negative_advantage_can_ask_for() -> None:
    logs = [math.log(ratio) for ratio in (2.0, 5.0, 5.0)]
    values, gradients, cut = acting(logs, [-2.0, -2.0, 1.0], clip_ratio=0.2, dual_clip=3.0)
    close(values, [-4.0, -6.0, 1.2])
    close(gradients, [-4.0, 0.0, 0.0])
    assert cut == [False, True, True]


def test_icepop_leaves_rows_outside_out_of_value_and_gradient() -> None:
    logs = [math.log(ratio) for ratio in (0.4, 0.5, 1.1, 5.0, 6.0)]
    values, gradients, _ = acting(logs, [1.0, 1.0, -1.0, 1.0, -1.0], clip_ratio=None, mismatch="icepop")
    close(values, [0.0, 0.5, -1.1, 5.0, 0.0])
    close(gradients, [0.0, 0.5, -1.1, 5.0, 0.0])


def test_cispo_keeps_the_gradient_where_the_weight_is_cut() -> None:
    logs = [math.log(ratio) for ratio in (2.0, 0.5, 1.0)]
    values, gradients, cut = acting(logs, [1.0, -1.0, 2.0], ratio="truncated", clip_ratio=1.0, clip_high=0.5)
    close(values, [1.5, -0.5, 2.0])
    close(gradients, [1.5, -0.5, 2.0])
    assert cut == [True, False, False]


def test_gspo_gives_every_token_the_ratio_of_its_response() -> None:
    logs = [0.3, -0.1, 0.1, 0.5, -0.2]
    sequence = [0, 0, 0, 2, 2]  # a response without rows lies between them
    first, second = math.exp(0.1), math.exp(0.15)
    values, gradients, _ = acting(logs, [1.0] * 5, sequence, ratio="sequence", clip_ratio=None)
    close(values, [first] * 3 + [second] * 2)
    close(gradients, [first] * 3 + [second] * 2)
    _, gradients, cut = acting(logs, [1.0] * 5, sequence, ratio="sequence", clip_ratio=0.12)
    close(gradients, [first] * 3 + [0.0] * 2)
    assert cut == [False] * 3 + [True] * 2
    with pytest.raises(ValueError, match="which rows belong together"):
        acting(logs, [1.0] * 5, None, ratio="sequence")
    nothing = torch.zeros(0)
    assert len(sequence_ratio(nothing, nothing, torch.zeros(0, dtype=torch.int64))) == 0


def test_gspo_is_the_gradient_of_the_papers_objective() -> None:
    """With one advantage per response: T times the gradient of s A, where s is the geometric mean of its ratios."""
    behaviour = torch.tensor([-1.0, -2.0, -0.5, -1.5], dtype=torch.float64)
    logprobs = (behaviour + torch.tensor([0.2, -0.1, 0.4, 0.0])).requires_grad_()
    sequence, advantage = torch.tensor([0, 0, 0, 1]), torch.tensor([0.7, 0.7, 0.7, -1.2], dtype=torch.float64)
    ratio = (logprobs - behaviour).exp()
    config = LossConfig(ratio="sequence", clip_ratio=None)
    (found,) = torch.autograd.grad(surrogate(logprobs, ratio, advantage, sequence, config).objective_R.sum(), logprobs)
    paper = torch.zeros((), dtype=torch.float64)
    for rows, value in (([0, 1, 2], 0.7), ([3], -1.2)):
        paper = paper + len(rows) * value * (logprobs[rows] - behaviour[rows]).mean().exp()
    (wanted,) = torch.autograd.grad(paper, logprobs)
    torch.testing.assert_close(found, wanted)


numbers = st.lists(st.floats(-2.0, 2.0), min_size=6, max_size=6)


@settings(deadline=None, max_examples=30)
@given(logits=numbers, teacher=numbers, advantages=numbers)
@pytest.mark.parametrize("ratio", RATIOS)
def test_on_policy_every_form_is_the_policy_gradient(
    ratio: str, logits: list[float], teacher: list[float], advantages: list[float]
) -> None:
    """Without a difference between mu and p the forms agree, whatever the clip: sum of A d log p, teacher included."""
    gradients = []
    for form in ("token", ratio):
        values = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
        logprobs = values.log_softmax(-1)
        config = LossConfig(ratio=form, kl_coef=0.5)  # type: ignore[arg-type]
        rows = Rows(
            logprobs_R=logprobs,
            behaviour_R=logprobs.detach(),
            teacher_R=torch.tensor(teacher, dtype=torch.float64),
            advantages_R=torch.tensor(advantages, dtype=torch.float64),
            staleness_R=torch.zeros(6, dtype=torch.int32),
            sequence_R=torch.tensor([0, 0, 0, 1, 1, 1]),
        )
        output = reverse_kl(rows, config)
        gradients.append(torch.autograd.grad(output.loss, values)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_signal_is_added_to_the_advantage_unscaled_and_unscaling() -> None:
    """The estimator's part and the teacher's add up: each is what it would be without the other."""
    logprobs = torch.tensor([-1.0, -2.0, -0.7], dtype=torch.float64, requires_grad=True)
    plain = Rows(
        logprobs_R=logprobs,
        behaviour_R=logprobs.detach() - 0.05,
        teacher_R=logprobs.detach(),
        advantages_R=torch.zeros(3, dtype=torch.float64),
        staleness_R=torch.zeros(3, dtype=torch.int32),
        sequence_R=torch.tensor([0, 0, 1]),
    )
    advantage = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    signal = torch.tensor([-0.2, 0.9, 0.1], dtype=torch.float64)
    nothing = torch.zeros_like(signal)

    def gradient(advantage: Tensor, signal: Tensor, config: LossConfig) -> Tensor:
        loss = policy_gradient(replace(plain, advantages_R=advantage), signal, config).loss
        return torch.autograd.grad(loss, logprobs)[0]

    for ratio in RATIOS:
        config = LossConfig(ratio=ratio, kl_coef=2.0)  # type: ignore[arg-type]
        both = gradient(advantage, signal, config)
        apart = gradient(advantage, nothing, config) + gradient(nothing, signal, config)
        torch.testing.assert_close(both, apart)


def test_what_is_clipped_is_reported() -> None:
    logprobs = torch.tensor([0.5, 0.0], requires_grad=True)
    rows = Rows(
        logprobs_R=logprobs,
        behaviour_R=torch.zeros(2),
        teacher_R=torch.zeros(2),
        advantages_R=torch.ones(2),
        staleness_R=torch.zeros(2, dtype=torch.int32),
    )
    output = policy_gradient(rows, torch.zeros(2), LossConfig(clip_ratio=0.2))
    assert output.sums["clipped"].tolist() == [1.0, 2.0]
    assert clipped(torch.ones(0), torch.ones(0), LossConfig()).objective_R.shape == (0,)
