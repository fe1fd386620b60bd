"""Matrix products of an LM head, whose results are float32 whatever the model's dtype.

A product of two bfloat16 matrices adds up in float32 and rounds at its end. Some devices have one that leaves the
rounding out: fewer bytes, and logits of size 16 to 32 are not a multiple of 1/8. Suffixes: see `learner.logprobs`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def logits(hidden_BX: Tensor, weight_VX: Tensor) -> Tensor:
    """`hidden_BX @ weight_VX.T`, float32[B, V]: not rounded in between where the device has such a product."""
    if has_wide_product(hidden_BX.device.type, hidden_BX.dtype):
        return torch.mm(hidden_BX, weight_VX.T, out_dtype=torch.float32)
    return (hidden_BX @ weight_VX.T).float()


def add_product(sum_VX: Tensor, grad_BV: Tensor, hidden_BX: Tensor) -> None:
    """Add `grad_BV.T @ hidden_BX` to `sum_VX`, float32[V, X], in place: without a matrix of that size in between where
    the device has such a product."""
    if hidden_BX.dtype is torch.float32:
        sum_VX.addmm_(grad_BV.T, hidden_BX)
    elif has_wide_sum(hidden_BX.device.type, hidden_BX.dtype):
        torch.addmm(sum_VX, grad_BV.T, hidden_BX, out_dtype=torch.float32, out=sum_VX)
    else:
        sum_VX += grad_BV.T @ hidden_BX


@cache
def has_wide_product(device: str, dtype: torch.dtype) -> bool:
    """True where the installed torch multiplies two matrices of `dtype` on `device` to one of float32: tried once."""
    if dtype is torch.float32:
        return False  # every product is one
    one = torch.ones(16, 16, dtype=dtype, device=device)
    return _works(lambda: torch.mm(one, one, out_dtype=torch.float32))


@cache
def has_wide_sum(device: str, dtype: torch.dtype) -> bool:
    """As `has_wide_product`, for a product that is added to a matrix of float32 in place."""
    one = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, device=device)
    return _works(lambda: torch.addmm(total, one, one, out_dtype=torch.float32, out=total))


def _works(product: Callable[[], Tensor]) -> bool:
    try:
        return product().dtype is torch.float32
    except (RuntimeError, TypeError):  # no kernel for the device or these dtypes; no such parameter
        return False
