"""Exact divergences: golden values, float64 enumeration, extremes, and the whole learner against transformers."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from full_fixtures import GOLDEN, GOLDEN_JSD, STUDENT, TEACHER, furthest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opd_async.config.losses import FULL_LOSSES
from opd_async.learner.config import LossConfig
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.losses.full_divergences import RowDivergences, row_divergences
from opd_async.learner.losses.logprobs import Head
from opd_async.learner.losses.objective import full_objective
from opd_async.learner.model.layout import PackedBatch, Packing


def world() -> dist.ProcessGroup:
    return dist.group.WORLD or dist.new_group()


def of_logits(loss: str, student: Tensor, teacher: Tensor, targets: Tensor, beta: float = 0.5) -> RowDivergences:
    """With the identity for a head, hidden states are logits."""
    vocab = student.shape[1]
    head = Head(weight=torch.eye(vocab), vocab=vocab, chunk_rows=2, group=world())
    return row_divergences(student, head, teacher, head, targets, loss=loss, beta=beta)


@pytest.mark.parametrize("loss", sorted(GOLDEN))
def test_golden_values(alone: Place, loss: str) -> None:
    student = torch.tensor([STUDENT], requires_grad=True)
    found = of_logits(loss, student, torch.tensor([TEACHER]), torch.tensor([0]))
    found.divergence_R.sum().backward()
    value, gradient = GOLDEN[loss]
    assert float(found.divergence_R.detach()) == pytest.approx(value, abs=1e-5)
    torch.testing.assert_close(student.grad, torch.tensor([gradient]), rtol=0.0, atol=1e-5)


def test_golden_values_of_the_jsd(alone: Place) -> None:
    for beta, value in GOLDEN_JSD.items():
        found = of_logits("jsd_full", torch.tensor([STUDENT]), torch.tensor([TEACHER]), torch.tensor([0]), beta)
        assert float(found.divergence_R) == pytest.approx(value, abs=1e-5)


def test_values_and_gradients_against_float64(alone: Place) -> None:
    found = furthest(world())
    assert {key.split()[0] for key in found} == FULL_LOSSES
    assert max(found.values()) < 1e-5, found


logits = st.lists(st.floats(-4.0, 4.0), min_size=6, max_size=6)


@settings(deadline=None, max_examples=40)
@given(loss=st.sampled_from(sorted(FULL_LOSSES)), student=logits, beta=st.floats(0.05, 0.95))
def test_zero_without_a_gradient_at_the_teacher(alone: Place, loss: str, student: list[float], beta: float) -> None:
    own = torch.tensor([student], requires_grad=True)
    found = of_logits(loss, own, torch.tensor([student]), torch.tensor([1]), beta)
    found.divergence_R.sum().backward()
    assert abs(float(found.divergence_R.detach())) < 1e-5
    torch.testing.assert_close(own.grad, torch.zeros_like(own), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("loss", sorted(FULL_LOSSES))
def test_certain_models_that_disagree_stay_finite(alone: Place, loss: str) -> None:
    student = torch.tensor([[200.0, 0.0, -200.0], [-300.0, 300.0, 0.0]], requires_grad=True)
    found = of_logits(loss, student, student.detach().flip(1), torch.tensor([2, 0]))
    (found.divergence_R + found.sampled_R).sum().backward()
    assert torch.isfinite(found.divergence_R).all() and student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", sorted(FULL_LOSSES))
def test_no_rows(alone: Place, loss: str) -> None:
    none = torch.zeros(0, 5, requires_grad=True)
    found = of_logits(loss, none, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    (found.divergence_R.sum() + found.sampled_R.sum()).backward()
    assert found.teacher_R.shape == (0,) and none.grad is not None


def test_minillm_is_the_gradient_of_the_whole_response(alone: Place) -> None:
    """Responses of two tokens, where the mean of the later signals is their sum: enumerated over all of them."""
    size, generator = 4, torch.Generator().manual_seed(5)
    # row 0: the first token; row 1 + i: the second token after i
    logits, teacher = (torch.randn(1 + size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    p, q = logits.log_softmax(-1), teacher.log_softmax(-1)
    first, second = p[0][:, None], p[1:]
    kl = ((first + second).exp() * (first + second - q[0][:, None] - q[1:])).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    config, total = LossConfig(loss="minillm_full", clip_ratio=None), torch.zeros(())
    for i, j in itertools.product(range(size), repeat=2):
        places, targets = torch.tensor([0, 1 + i]), torch.tensor([i, j])
        found = of_logits("minillm_full", logits[places].float(), teacher[places].float(), targets)
        none, zeros = torch.zeros(0), torch.zeros(2)
        rows = PackedBatch(
            token_ids_P=none,
            positions_P=none,
            packing=Packing(),
            rows_O=none,
            own_O=None,
            targets_R=targets,
            behaviour_R=found.sampled_R.detach(),
            teacher_R=None,
            advantages_R=zeros,
            staleness_R=zeros,
            sequence_R=torch.tensor([0, 0]),
            topk_ids_RK=None,
            topk_logprobs_RK=None,
        )
        probability = (p[0, i] + p[1 + i, j]).exp().detach().float()
        total = total + probability * full_objective(rows, found, config).loss
    (gradient,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradient, expected, rtol=0.0, atol=1e-5)
