"""Losses on the teacher's top-k: values and gradients made by hand, and against float64 enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_async.estimators.topk import NO_LOGPROB, NO_TOKEN, TopK
from opd_async.learner.config import LossConfig
from opd_async.learner.losses.divergences import (
    DIVERGENCES,
    Cells,
    forward_kl_topk,
    jsd_topk,
    long_returns,
    minillm_topk,
    reverse_kl_topk,
    tail_logprob,
)
from opd_async.learner.losses.objective import with_divergence
from opd_async.learner.losses.sampled import Rows, reverse_kl

STUDENT = [2.0, 1.0, 0.5, -0.5, -1.0]
TEACHER = [1.5, 1.8, -0.2, 0.3, -1.2]
SUPPORT = [1, 0]


def value_and_gradient(
    name: str, student: list[float], teacher: list[float], support: list[int], **options: float
) -> tuple[Tensor, Tensor]:
    """The loss of one row and its gradient in the student's logits, in the precision of the learner."""
    logits = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    logprobs, ids = logits.log_softmax(-1), torch.tensor(support)
    tail = logprobs.scatter(0, ids, -torch.inf).logsumexp(-1)
    teacher_support = torch.tensor(teacher, dtype=torch.float64).log_softmax(-1)[ids].float()
    cells = Cells(logprobs[ids].float()[None], tail.float()[None], teacher_support[None])
    (value,) = DIVERGENCES[name](cells, LossConfig(loss=name, **options))  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach().double(), gradient


def enumerated(name: str, student: list[float], teacher: list[float], support: list[int], beta: float) -> Tensor:
    """[value, gradient...] in float64 from the definitions over cells, one token after another."""
    logits = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    p, q = logits.softmax(-1), torch.tensor(teacher, dtype=torch.float64).softmax(-1)
    cells = [(p[i], q[i]) for i in support]
    outside = [i for i in range(len(student)) if i not in support]
    whole = [*cells, (p[outside].sum(), q[outside].sum())]
    value = torch.zeros((), dtype=torch.float64)
    if name == "reverse_kl_topk":
        for a, b in cells:
            value = value + a * (a / b).log() - a + b
    for a, b in whole:
        if name == "forward_kl_topk":
            value = value + b * (b / a).log()
        if name == "minillm_topk":
            value = value + a * (a / b).log()
        if name == "jsd_topk":
            m = beta * b + (1.0 - beta) * a
            value = value + beta * b * (b / m).log() + (1.0 - beta) * a * (a / m).log()
    (gradient,) = torch.autograd.grad(value, logits)
    return torch.cat([value.detach()[None], gradient])


GOLDEN = {
    "forward_kl_topk": (0.167416, [0.235707, -0.251792, 0.010110, 0.003719, 0.002256]),
    "minillm_topk": (0.152840, [0.213710, -0.198964, -0.009268, -0.003410, -0.002068]),
    "reverse_kl_topk": (0.152178, [0.223430, -0.195388, -0.017625, -0.006484, -0.003933]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name: str) -> None:
    value, gradient = value_and_gradient(name, STUDENT, TEACHER, SUPPORT)
    expected, expected_gradient = GOLDEN[name]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(gradient, torch.tensor(expected_gradient, dtype=torch.float64), rtol=0.0, atol=1e-5)


def test_a_support_of_all_but_one_token_gives_the_full_divergences() -> None:
    """Then the tail is one token, and nothing is truncated. Forward KL with its gradient p - q, and the JSD."""
    value, gradient = value_and_gradient("forward_kl_topk", STUDENT, TEACHER, [0, 1, 2, 3])
    assert float(value) == pytest.approx(0.2132049, abs=1e-5)
    golden = torch.tensor([0.235707, -0.251792, 0.066536, -0.056182, 0.005731], dtype=torch.float64)
    torch.testing.assert_close(gradient, golden, rtol=0.0, atol=1e-5)
    for beta, expected in ((0.1, 0.0189072), (0.5, 0.0504601), (0.9, 0.0178914)):
        value, _ = value_and_gradient("jsd_topk", STUDENT, TEACHER, [0, 1, 2, 3], jsd_beta=beta)
        assert float(value) == pytest.approx(expected, abs=1e-5)


def test_the_jsd_tends_to_the_forward_and_to_the_reverse_kl() -> None:
    near_0, _ = value_and_gradient("jsd_topk", STUDENT, TEACHER, [0, 1, 2, 3], jsd_beta=1e-3)
    near_1, _ = value_and_gradient("jsd_topk", STUDENT, TEACHER, [0, 1, 2, 3], jsd_beta=1.0 - 1e-3)
    assert float(near_0) / 1e-3 == pytest.approx(0.2132049, rel=5e-3)
    assert float(near_1) / 1e-3 == pytest.approx(0.1987494, rel=5e-3)


def test_the_reverse_kl_has_the_gradient_of_its_stopped_form() -> None:
    logits = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    p, q = logits.log_softmax(-1), torch.tensor(TEACHER, dtype=torch.float64).log_softmax(-1)
    stopped = ((p.exp() * (p - q)).detach() * p)[SUPPORT].sum()
    (expected,) = torch.autograd.grad(stopped, logits)
    _, gradient = value_and_gradient("reverse_kl_topk", STUDENT, TEACHER, SUPPORT)
    torch.testing.assert_close(gradient, expected, rtol=0.0, atol=1e-6)


def test_tokens_that_the_student_has_not_are_in_the_tail() -> None:
    """A teacher of seven ids, of which the student has five; its five likeliest are the places of a top-k.

    The student's p is 0 at the other two: the cells are the three ids of both, and everything else.
    """
    teacher, places = [*TEACHER, 1.6, -0.4], [1, 5, 0, 3, 6]
    q = torch.tensor(teacher, dtype=torch.float64).log_softmax(-1)[places].float().numpy()[None]
    topk = TopK(np.array([places], np.int32), q).below(len(STUDENT))
    assert topk.ids.tolist() == [[1, NO_TOKEN, 0, 3, NO_TOKEN]] and topk.problem() is None
    kept = [1, 0, 3]
    for name in DIVERGENCES:
        logits = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
        logprobs = logits.log_softmax(-1)
        tail = logprobs.scatter(0, torch.tensor(kept), -torch.inf).logsumexp(-1)
        ids = torch.from_numpy(topk.ids[0].astype(np.int64))
        own = logprobs[ids.clamp(min=0)].masked_fill(ids < 0, NO_LOGPROB)
        cells = Cells(own.float()[None], tail.float()[None], torch.from_numpy(topk.logprobs))
        (value,) = DIVERGENCES[name](cells, LossConfig(loss=name, jsd_beta=0.3))
        (gradient,) = torch.autograd.grad(value, logits)
        # a student of seven ids that never samples the last two
        whole = [*STUDENT, -torch.inf, -torch.inf]
        expected = enumerated(name, whole, teacher, kept, 0.3)
        torch.testing.assert_close(value.detach().double(), expected[0], rtol=0.0, atol=1e-6)
        torch.testing.assert_close(gradient, expected[1:6], rtol=0.0, atol=1e-6)
        assert not expected[6:].any()


logits = st.lists(st.floats(-4.0, 4.0), min_size=7, max_size=7)


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(sorted(DIVERGENCES)),
    student=logits,
    teacher=logits,
    k=st.integers(1, 6),
    beta=st.floats(0.05, 0.95),
)
def test_enumeration(name: str, student: list[float], teacher: list[float], k: int, beta: float) -> None:
    support = sorted(range(7), key=lambda i: -teacher[i])[:k]
    value, gradient = value_and_gradient(name, student, teacher, support, jsd_beta=beta)
    expected = enumerated(name, student, teacher, support, beta)
    torch.testing.assert_close(torch.cat([value[None], gradient]), expected, rtol=1e-5, atol=1e-5)
    assert float(value) >= -1e-6


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(sorted(DIVERGENCES)), both=logits, k=st.integers(1, 6))
def test_no_gradient_at_the_teacher(name: str, both: list[float], k: int) -> None:
    value, gradient = value_and_gradient(name, both, both, sorted(range(7), key=lambda i: -both[i])[:k])
    assert abs(float(value)) < 1e-5
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0.0, atol=1e-5)


def test_a_teacher_without_a_tail_gives_finite_losses() -> None:
    certain = torch.tensor([[0.0, -40.0], [1e-4, -30.0]])
    assert (tail_logprob(certain) >= math.log(0.99e-7)).all()
    # the rest of a mass near 1 is a small difference, of which float32 sums keep one digit
    near = torch.tensor([0.7, 0.2, 0.05, 0.03, 0.019, 0.000995], dtype=torch.float64).log().float()
    rest = math.log1p(-math.fsum(math.exp(value) for value in near.tolist()))
    assert tail_logprob(near[None]).item() == pytest.approx(rest, abs=1e-5)
    student = torch.tensor([[-50.0, -1e-7], [-1e-9, -60.0]], requires_grad=True)
    tail = torch.tensor([-16.0, -70.0], requires_grad=True)
    for divergence in (forward_kl_topk, reverse_kl_topk, jsd_topk, minillm_topk):
        found = divergence(Cells(student, tail, certain), LossConfig())
        gradients = torch.autograd.grad(found.sum(), (student, tail), allow_unused=True)
        assert torch.isfinite(found).all()
        assert all(gradient is None or torch.isfinite(gradient).all() for gradient in gradients)


def test_the_advantage_keeps_its_ratio_and_the_divergence_has_none() -> None:
    """kl_coef * divergence + the advantage's policy gradient: the sampled token's teacher logprob plays no part."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    behaviour, advantages = torch.tensor([-1.1, -2.0]), torch.tensor([2.0, -1.0])
    staleness = torch.zeros(2, dtype=torch.int32)
    support = torch.tensor([[-1.0, -2.0], [-0.5, -1.5]], requires_grad=True)
    teacher_support = torch.tensor([[-0.8, -2.2], [-0.7, -1.4]])
    config = LossConfig(loss="reverse_kl_topk", kl_coef=0.5, signal_clamp=0.1)
    rows = Rows(
        logprobs_R=logprobs,
        behaviour_R=behaviour,
        teacher_R=torch.tensor([-3.0, -4.0]),
        advantages_R=advantages,
        staleness_R=staleness,
    )
    found = with_divergence(rows, torch.zeros(2), Cells(support, None, teacher_support), config)
    from_advantage = reverse_kl(rows, LossConfig(kl_coef=0.0))
    divergence = reverse_kl_topk(Cells(support, None, teacher_support), config).sum()
    torch.testing.assert_close(found.loss, from_advantage.loss + 0.5 * divergence)
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, logprobs, retain_graph=True)[0],
        torch.autograd.grad(from_advantage.loss, logprobs)[0],
    )
    sums = {name: value.tolist() for name, value in found.sums.items()}
    assert sums["loss"] == [pytest.approx(float(found.loss.detach())), 2.0]
    assert sums["reverse_kl"] == [pytest.approx(math.exp(0.1) * 2.0 + 2.0), 2.0]
    assert sums["clamped"] == [0.0, 2.0]
    assert sums["student_support"] == [pytest.approx(float(support.detach().exp().sum())), 2.0]
    assert sums["teacher_support"] == [pytest.approx(float(teacher_support.exp().sum())), 2.0]
    assert not {"entropy", "reference_kl"} & set(sums)


def test_returns_are_means_of_what_follows_in_the_same_sequence() -> None:
    signal = torch.tensor([0.2, -0.5, 0.1, -0.3, 5.0, 1.0, 2.0])
    found = long_returns(signal, torch.tensor([0, 0, 0, 0, 2, 3, 3]))
    torch.testing.assert_close(found, torch.tensor([-0.7 / 3, -0.1, -0.3, 0.0, 0.0, 2.0, 0.0]))
    assert long_returns(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000))
def test_minillm_is_the_gradient_of_the_whole_response(seed: int) -> None:
    """Responses of two tokens, where the mean of the later signals is their sum: enumerated over all of them."""
    size, generator = 4, torch.Generator().manual_seed(seed)
    # row 0: the first token; row 1 + i: the second token after i
    logits = torch.randn(1 + size, size, generator=generator, dtype=torch.float64).requires_grad_()
    p, q = logits.log_softmax(-1), torch.randn(1 + size, size, generator=generator, dtype=torch.float64).log_softmax(-1)
    first, second = p[0][:, None], p[1:]
    kl = ((first + second).exp() * (first + second - q[0][:, None] - q[1:])).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    support = q.topk(size - 1).indices
    tails = p.scatter(1, support, -torch.inf).logsumexp(-1)
    config, total = LossConfig(loss="minillm_topk", clip_ratio=None), torch.zeros(())
    for i in range(size):
        for j in range(size):
            places = torch.tensor([0, 1 + i])
            tokens = torch.tensor([[i], [j]])
            own, teacher = (values[places].gather(1, tokens)[:, 0].float() for values in (p, q))
            cells = Cells(
                student_RK=p.gather(1, support)[places].float(),
                student_tail_R=tails[places].float(),
                teacher_RK=q.gather(1, support)[places].float(),
            )
            rows = Rows(
                logprobs_R=own,
                behaviour_R=own.detach(),
                teacher_R=teacher,
                advantages_R=torch.zeros(2),
                staleness_R=torch.zeros(2, dtype=torch.int32),
            )
            returns = long_returns(teacher - own.detach(), torch.tensor([0, 0]))
            probability = (p[0, i] + p[1 + i, j]).exp().detach().float()
            total = total + probability * with_divergence(rows, returns, cells, config).loss
    (found,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)
