"""Chunked log-probabilities against a float64 log-softmax: values, gradients, padding of the vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from opd_async.learner.distributed.parallel import Place
from opd_async.learner.losses.logprobs import Head, row_logprobs

ROWS, HIDDEN, VOCAB = 11, 8, 19


def problem(padding: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [R, X], weight [V + padding, X], targets [R], weights of a sum [R]."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB + padding, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    return hidden, weight, targets, torch.randn(ROWS, generator=generator)


@pytest.mark.parametrize("chunk_rows", [1, 4, 11, 1000])
@pytest.mark.parametrize("padding", [0, 3])
def test_values_and_gradients(alone: Place, chunk_rows: int, padding: int) -> None:
    hidden, weight, targets, mix = problem(padding)
    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = exact_hidden @ exact_weight[:VOCAB].T
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * mix).sum().backward()

    hidden.requires_grad_()
    weight.requires_grad_()
    group = dist.group.WORLD or dist.new_group()
    head = Head(weight=weight, vocab=VOCAB, chunk_rows=chunk_rows, group=group)
    found = row_logprobs(hidden, head, targets).sampled_R
    (found * mix).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=1e-5)
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=0.0, atol=1e-5)
    assert not weight.grad[VOCAB:].any()


def test_no_rows_give_zero_gradients(alone: Place) -> None:
    hidden, weight, targets, _ = problem()
    weight.requires_grad_()
    none = hidden[:0].requires_grad_()
    group = dist.group.WORLD or dist.new_group()
    head = Head(weight=weight, vocab=VOCAB, chunk_rows=4, group=group)
    found = row_logprobs(none, head, targets[:0]).sampled_R
    found.sum().backward()
    assert found.shape == (0,)
    assert weight.grad is not None and not weight.grad.any()
