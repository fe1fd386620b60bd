"""A stand-in for SGLang's compiled kernels (`sgl_kernel`), for machines without CUDA. Not the real package.

The package index carries only CUDA builds. SGLang's CPU engine falls back to its own PyTorch code wherever
`torch.ops.sgl_kernel` has no operator, so it needs just two small functions, written here in plain PyTorch; every
other name exists, because SGLang imports some at start, and refuses to be called. Only tests and tiny models belong
on this: it is slow and knows no quantised, speculative or hybrid models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

__version__ = "0.0.0+cpu.standin"


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, starts: Tensor, ends: Tensor, out_cache_loc: Tensor, pool_len: int
) -> None:
    """Write each request's new cache slots into its row of `req_to_token` [requests, pool_len], columns [start, end).

    `out_cache_loc` holds the slots of all requests back to back.
    """
    rows, lengths = req_pool_indices.tolist(), (ends - starts).tolist()
    for row, start, slots in zip(rows, starts.tolist(), out_cache_loc.split(lengths), strict=True):
        req_to_token[row, start : start + len(slots)] = slots.to(req_to_token.dtype)


def copy_all_layer_kv_cache_cpu(bases: Tensor, strides: Tensor, targets: Tensor, sources: Tensor) -> None:
    """Copy cache slots `sources` to `targets` in every layer's buffer (address `base`, `stride` bytes per slot)."""
    for base, stride in zip(bases.tolist(), strides.tolist(), strict=True):
        # All are read before any is written: slots may be source and target at once.
        held = [ctypes.string_at(base + slot * stride, stride) for slot in sources.tolist()]
        for slot, data in zip(targets.tolist(), held, strict=True):
            ctypes.memmove(base + slot * stride, data, stride)


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU: this is a stand-in for machines without one")

    return absent
