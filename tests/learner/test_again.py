"""Activations that are made again: not kept, made from the same inputs once, and the gradients are the same bits."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from opd_async.learner.model import gated
from opd_async.learner.model.again import kept_as_made, made_by
from opd_async.learner.model.norm import in_parts

EPS = 1e-6


def forward(
    hidden: Tensor, scale: Tensor, weight: Tensor, calls: list[str] | None
) -> tuple[Tensor, weakref.ref[object]]:
    """A norm and a product, and whether what is in between is still held; with `calls`, it is made again."""
    normed = in_parts(hidden, scale, EPS, centred=False)
    if calls is not None:

        def again() -> Tensor:
            calls.append("again")
            return in_parts(hidden.detach(), scale.detach(), EPS, centred=False)

        made_by(normed, again)
    held = weakref.ref(normed.untyped_storage())
    with kept_as_made(normed):
        return functional.linear(normed, weight), held


def test_what_a_product_would_keep_is_made_again_in_the_backward_pass() -> None:
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((5, 1, 8), (8,), (3, 8))]
    plain, held = forward(*inputs, None)
    gc.collect()
    assert held() is not None, "a product keeps its input for the gradient of its weight"
    grad = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, inputs, grad)
    calls: list[str] = []
    output, held = forward(*inputs, calls)
    gc.collect()
    assert held() is None and calls == []
    found = torch.autograd.grad(output, inputs, grad)
    assert calls == ["again"]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_other_tensors_are_kept_as_they_are() -> None:
    """A tensor of the same shape, and the weight, are not mistaken for what can be made again."""
    normed, other, weight = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    noted = made_by(normed * 1.0, partial(torch.zeros, 4, 4))
    with kept_as_made(noted):
        output = functional.linear(other * 1.0, weight)
    (grad,) = torch.autograd.grad(output.sum(), weight)
    torch.testing.assert_close(grad, other.detach().sum(0).expand(4, 4))


def test_nothing_is_noted_without_gradients() -> None:
    with torch.no_grad():
        output = made_by(torch.ones(2), partial(torch.ones, 2))
    assert not hasattr(output, "made_by")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "by_torch"),
    [(gated.SILU, functional.silu), (gated.GELU, partial(functional.gelu, approximate="tanh"))],
    ids=["silu", "gelu"],
)
def test_the_gate_and_its_gradient_are_torchs(
    activation: gated.Activation, by_torch: object, dtype: torch.dtype
) -> None:
    both = (3 * torch.randn(7, 1, 24)).to(dtype).requires_grad_()
    gates, ups = both.chunk(2, -1)
    expected = by_torch(gates) * ups  # type: ignore[operator]
    grad = torch.randn(7, 1, 12).to(dtype)
    (expected_grad,) = torch.autograd.grad(expected, both, grad)
    found = gated._Gate.apply(both, activation)
    (found_grad,) = torch.autograd.grad(found, both, grad)
    assert torch.equal(found, expected) and torch.equal(found_grad, expected_grad)
