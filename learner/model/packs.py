"""Attention over a whole pack of sequences in one kernel: torch's, FlashAttention 3's, Transformer Engine's.

Shapes: Q queries of a piece (`learner.context`), H query heads and G key/value heads of this rank, E channels per head.
All three are causal, where the last query of a sequence sees its last key, and take bfloat16 or float16 only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from opd_async.learner.model.context import Piece, whole

TRIED_TOKENS = 16


class PackKernel(Protocol):
    """Attention of a piece: `query` [Q, H, E] and its `keys` and `values` [keys, G, E] -> [Q, H, E].

    Scores are multiplied by `scale`. A query sees the last `window` keys up to its own; None: all of them.
    """

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, piece: Piece, *, scale: float, window: int | None
    ) -> Tensor: ...


def by_torch(query: Tensor, keys: Tensor, values: Tensor, piece: Piece, *, scale: float, window: int | None) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`: FlashAttention 2, which torch brings along."""
    varlen_attn, says_shared = _varlen_attention()
    shared = {"enable_gqa": query.shape[1] != keys.shape[1]} if says_shared else {}
    bounds = (piece.query_bounds, piece.key_bounds, *piece.longest)
    output = varlen_attn(query, keys, values, *bounds, scale=scale, window_size=_sides(window), **shared)
    assert isinstance(output, Tensor)  # a tuple only where auxiliary outputs are asked for
    return output


def by_flash3(query: Tensor, keys: Tensor, values: Tensor, piece: Piece, *, scale: float, window: int | None) -> Tensor:
    """`flash_attn_varlen_func` of FlashAttention 3, for Hopper GPUs; older releases answer with a tuple."""
    found = _flash3()(
        query,
        keys,
        values,
        cu_seqlens_q=piece.query_bounds,
        cu_seqlens_k=piece.key_bounds,
        max_seqlen_q=piece.longest[0],
        max_seqlen_k=piece.longest[1],
        softmax_scale=scale,
        causal=True,
        window_size=_sides(window),
    )
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output


def by_transformer_engine(
    query: Tensor, keys: Tensor, values: Tensor, piece: Piece, *, scale: float, window: int | None
) -> Tensor:
    """`DotProductAttention` of Transformer Engine, which takes cuDNN's kernel or FlashAttention, as it finds fit.

    Only for pieces whose queries are all of their keys: without context parallelism.
    """
    assert piece.keys is None
    module = _dot_product(query.shape[1], keys.shape[1], query.shape[2], scale, _sides(window))
    output: Tensor = module(
        query.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        cu_seqlens_q=piece.query_bounds,
        cu_seqlens_kv=piece.key_bounds,
        # without these two it would ask the device
        max_seqlen_q=piece.longest[0],
        max_seqlen_kv=piece.longest[1],
    )
    return output.view(query.shape)


def _sides(window: int | None) -> tuple[int, int]:
    """How many keys before its own, and after, a query sees; -1: all."""
    return (-1 if window is None else window - 1, 0)


@cache
def _varlen_attention() -> tuple[Callable[..., Any], bool]:
    """torch's kernel for packs of sequences, and whether it must be told that heads share keys.

    Until torch 2.11 it takes them as they come and knows no such parameter.
    """
    from torch.nn.attention.varlen import varlen_attn  # imports flash attention, CUDA only

    return varlen_attn, "enable_gqa" in inspect.signature(varlen_attn).parameters


@cache
def _flash3() -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_varlen_func

    kernel: Callable[..., Any] = flash_attn_varlen_func
    return kernel


@cache
def _dot_product(heads: int, groups: int, channels: int, scale: float, sides: tuple[int, int]) -> Any:
    """One module for all layers that are alike. It has no weights, and is no part of the model: its `_extra_state`
    would be in every checkpoint."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        channels,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        window_size=sides,
        softmax_scale=scale,
    )


@cache
def problem(kernel: Any, heads: int, groups: int, channels: int, window: int | None) -> str | None:
    """Why a `PackKernel` cannot do an attention on this GPU, in its own words: it is tried in small, and its backward.

    A package may lack a width of heads, windows or the backward pass, as it was built.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    [piece] = whole(np.array([TRIED_TOKENS]), device)
    query, keys, values = (
        torch.zeros(TRIED_TOKENS, count, channels, dtype=torch.bfloat16, device=device, requires_grad=True)
        for count in (heads, groups, groups)
    )
    try:
        with torch.enable_grad():
            output = kernel(query, keys, values, piece, scale=channels**-0.5, window=window)
            torch.autograd.grad(output.sum(), (query, keys, values))
    except Exception as error:  # the edge of another's package: it raises what it likes
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return None
