"""Logprobs of a support and of the tail outside it, against float64: values, gradients, tails of almost nothing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from opd_async.estimators.topk import NO_LOGPROB, NO_TOKEN
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.losses.logprobs import Entropy, Head, row_logprobs

ROWS, HIDDEN, VOCAB, K = 11, 8, 19, 5


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("scale", [1.0, 15.0])
def test_values_and_gradients(alone: Place, chunk_rows: int, padding: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(ROWS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB + padding, HIDDEN, generator=generator)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    support = (hidden @ weight[:VOCAB].T).topk(K).indices
    mix = torch.randn(ROWS, K + 3, generator=generator)

    exact_hidden, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logprobs = (exact_hidden @ exact_weight[:VOCAB].T).log_softmax(-1)
    tail = logprobs.scatter(1, support, -torch.inf).logsumexp(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    chosen = [logprobs.gather(1, targets[:, None]), logprobs.gather(1, support)]
    expected = torch.cat([*chosen, tail[:, None], entropy[:, None]], 1)
    (expected * mix).sum().backward()
    if scale > 1.0:
        assert float(tail.detach().min()) < -20.0  # 1 - sum_S p would be 0 in float32

    hidden.requires_grad_()
    weight.requires_grad_()
    group = dist.group.WORLD or dist.new_group()
    head = Head(weight=weight, vocab=VOCAB, chunk_rows=chunk_rows, group=group)
    found = row_logprobs(hidden, head, targets, support, tail=True, entropy=Entropy.TRAINED)
    assert found.support_RK is not None and found.tail_R is not None and found.entropy_R is not None
    values = torch.cat([found.sampled_R[:, None], found.support_RK, found.tail_R[:, None], found.entropy_R[:, None]], 1)
    (values * mix).sum().backward()
    tolerance = 1e-5 * scale
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=tolerance)
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=0.0, atol=tolerance)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=0.0, atol=5 * tolerance)
    assert not weight.grad[VOCAB:].any()
    seen = row_logprobs(hidden, head, targets, support, tail=True, entropy=Entropy.SEEN).entropy_R
    assert seen is not None and not seen.requires_grad and torch.equal(seen, found.entropy_R)


def test_no_rows_give_zero_gradients(alone: Place) -> None:
    weight = torch.ones(VOCAB, HIDDEN, requires_grad=True)
    none, no_id = torch.zeros(0, HIDDEN, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    group = dist.group.WORLD or dist.new_group()
    head = Head(weight=weight, vocab=VOCAB, chunk_rows=4, group=group)
    found = row_logprobs(none, head, no_id, no_id[:, None], tail=True)
    assert found.support_RK is not None and found.tail_R is not None
    (found.support_RK.sum() + found.tail_R.sum() + found.sampled_R.sum()).backward()
    assert (found.support_RK.shape, found.tail_R.shape) == ((0, 1), (0,))
    assert weight.grad is not None and not weight.grad.any()


def test_a_place_without_a_token_is_part_of_the_tail(alone: Place) -> None:
    """Of a support of which the student has not every token: the others and the tail are those of a smaller support."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(ROWS, HIDDEN, generator=generator), torch.randn(VOCAB, HIDDEN, generator=generator)
    support = (hidden @ weight.T).topk(K).indices
    targets, group = support[:, 0].clone(), dist.group.WORLD or dist.new_group()
    mix = torch.randn(ROWS, K + 1, generator=generator)
    results = []
    for places in (support[:, [0, 1, 3]], torch.where(torch.arange(K) % 4 == 2, NO_TOKEN, support)[:, :4]):
        own = hidden.clone().requires_grad_()
        head = Head(weight=weight, vocab=VOCAB, chunk_rows=4, group=group)
        found = row_logprobs(own, head, targets, places, tail=True)
        assert found.support_RK is not None and found.tail_R is not None
        values = torch.cat([found.support_RK[places >= 0].reshape(ROWS, 3), found.tail_R[:, None]], 1)
        assert (found.support_RK[places < 0] == NO_LOGPROB).all()
        (values * mix[:, :4]).sum().backward()
        assert own.grad is not None
        results.append((values.detach(), own.grad))
    torch.testing.assert_close(*results, rtol=0.0, atol=1e-6)
    assert float(results[0][1].abs().max()) > 0.1
