"""Products of the LM head: float32 results on every device; the ways that only a GPU has are in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from opd_async.learner.losses.products import add_product, has_wide_product, has_wide_sum, logits

ROWS, HIDDEN, VOCAB = 7, 24, 19


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, grad = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((ROWS, HIDDEN), (VOCAB, HIDDEN), (ROWS, VOCAB))
    )
    room = 1e-6 if dtype is torch.float32 else 4e-3
    found, right = logits(hidden, weight), hidden.double() @ weight.double().T
    assert found.dtype is torch.float32 and (found - right).norm() <= room * right.norm()
    total = torch.full((VOCAB, HIDDEN), 0.5)
    right = total.double() + grad.double().T @ hidden.double()
    add_product(total, grad, hidden)
    assert total.dtype is torch.float32 and (total - right).norm() <= room * right.norm()


def test_a_device_without_such_a_product_is_found_out() -> None:
    assert not has_wide_product("cpu", torch.float32), "there it is nothing special"
    for dtype in (torch.bfloat16, torch.float16):
        one = torch.ones(4, 4, dtype=dtype)
        for has, product in (
            (has_wide_product, lambda one=one: torch.mm(one, one, out_dtype=torch.float32)),
            (has_wide_sum, lambda one=one: torch.addmm(torch.zeros(4, 4), one, one, out_dtype=torch.float32)),
        ):
            try:
                there = product().dtype is torch.float32
            except RuntimeError:
                there = False
            assert has("cpu", dtype) is there
