"""RMSNorm on a GPU is one call of torch; on the CPU it is made of parts. Both are the textbook's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd_async.learner.model.norm import in_one_kernel, in_parts

EPS = 1e-6
SHAPES = {"hidden": (37, 1, 256), "heads": (37, 4, 16)}


def outputs(norm: object, hidden: Tensor, weight: Tensor, grad: Tensor, *, centred: bool) -> list[Tensor]:
    """The norm, and the gradients of its input and its weight."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (hidden, weight))
    normed = norm(hidden, weight, EPS, centred=centred)  # type: ignore[operator]
    assert normed.dtype is hidden.dtype and normed.shape == hidden.shape
    return [normed.detach(), *torch.autograd.grad(normed, (hidden, weight), grad)]


def by_the_book(hidden: Tensor, weight: Tensor, eps: float, *, centred: bool) -> Tensor:
    """x / sqrt(mean x^2 + eps) * w, in the dtype of its input."""
    return hidden * (hidden.square().mean(-1, keepdim=True) + eps) ** -0.5 * (weight + 1 if centred else weight)


def case(shape: tuple[int, ...], dtype: torch.dtype, *, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Activations of unlike size, weights around 1 as they are stored, and a gradient."""
    generator = torch.Generator().manual_seed(shape[-1])
    hidden = torch.randn(shape, generator=generator) * torch.logspace(-2, 2, shape[0])[:, None, None]
    weight = torch.randn(shape[-1], generator=generator) * 0.3 + (0.0 if centred else 1.0)
    return hidden.to(dtype), weight.to(dtype), torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_kernel_gives_what_parts_give(shape: str, centred: bool) -> None:
    given = case(SHAPES[shape], torch.float32, centred=centred)
    for one, parts in zip(
        outputs(in_one_kernel, *given, centred=centred), outputs(in_parts, *given, centred=centred), strict=True
    ):
        assert (one - parts).norm() <= 1e-6 * parts.norm()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_kernel_rounds_no_worse_in_bfloat16(shape: str, centred: bool) -> None:
    given = case(SHAPES[shape], torch.bfloat16, centred=centred)
    right = outputs(by_the_book, *(tensor.double() for tensor in given), centred=centred)
    errors = [
        [float((found.double() - wanted).norm() / wanted.norm()) for found, wanted in zip(way, right, strict=True)]
        for way in (outputs(norm, *given, centred=centred) for norm in (in_one_kernel, in_parts))
    ]
    for one, parts in zip(*errors, strict=True):
        assert one <= parts * 1.01 and one < 4e-3
