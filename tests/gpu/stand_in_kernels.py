"""Stand-ins for kernels that cannot be imported without a GPU: names and parameters are the packages' own, as read in
their sources, and values are the harness's own attention, or the learner's own code. They show that the learner calls
what there is, with what it takes; they say nothing about the kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.attention.varlen as varlen
from pretend_cuda import count_sync
from torch import Tensor

from opd_async.learner.model import gated, norm, packs


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: Any = None, seqused_k: Any = None, softmax_scale: float | None = None, causal: bool = False,
    qv: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    window_size: tuple[int, int] = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: Any = None, deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """As `flash_attn_interface` of FlashAttention 3 declares it."""
    assert causal and q.shape[2] <= 256 and q.shape[2] % 8 == 0
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    return attend(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), softmax_scale, window_size)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor], longest: tuple[int, int],
    scale: float | None, sides: tuple[int, int],
) -> Tensor:  # fmt: skip
    """torch's kernel for packs, or what stands in for it."""
    window = (sides[0], 0)  # a causal kernel looks no further ahead, whatever it is told
    options = {"enable_gqa": query.shape[1] != key.shape[1]}
    made: Tensor = varlen.varlen_attn(query, key, value, *bounds, *longest, scale=scale, window_size=window, **options)  # type: ignore[assignment]
    return made


class DotProductAttention(torch.nn.Module):
    """As `transformer_engine.pytorch` declares it, for packs ("thd"), with what it asserts of its arguments."""

    def __init__(
        self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None, sequence_parallel: bool = False, tp_size: int = 1,
        get_rng_state_tracker: Any = None, tp_group: Any = None, layer_number: int | None = None,
        attention_type: str = "self", cp_group: Any = None, cp_global_ranks: Any = None, cp_stream: Any = None,
        cp_comm_type: str = "p2p", softmax_scale: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert qkv_format == "thd" and "padding" in attn_mask_type and not attention_dropout
        self.heads, self.groups, self.channels = num_attention_heads, num_gqa_groups, kv_channels
        self.sides, self.scale = window_size, softmax_scale

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: Any = None,
        qkv_format: str | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Any = None, cu_seqlens_kv_padded: Any = None, max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None, attn_mask_type: str | None = None, window_size: Any = None,
    ) -> Tensor:  # fmt: skip
        """[tokens, heads, channels] each -> [tokens, heads * channels]."""
        assert query_layer.is_cuda and key_layer.is_cuda and value_layer.is_cuda
        assert query_layer.shape[1:] == (self.heads, self.channels) and query_layer.dim() == 3
        assert key_layer.shape == value_layer.shape and key_layer.shape[1] == self.groups
        assert cu_seqlens_q is not None and cu_seqlens_kv is not None and cu_seqlens_q.shape == cu_seqlens_kv.shape
        assert cu_seqlens_q.dtype is cu_seqlens_kv.dtype is torch.int32
        if max_seqlen_q is None or max_seqlen_kv is None:
            count_sync("item")
        longest: Any = (max_seqlen_q, max_seqlen_kv)
        sides = (-1, 0) if self.sides is None else self.sides
        bounds = (cu_seqlens_q, cu_seqlens_kv)
        return attend(query_layer, key_layer, value_layer, bounds, longest, self.scale, sides).flatten(1)


class LigerRMSNormFunction:
    """As `liger_kernel.ops.rms_norm` has it; values are the learner's own norm."""

    @staticmethod
    def apply(X: Tensor, W: Tensor, eps: float, offset: float, casting_mode: str, in_place: bool, row_mode: Any) -> Any:
        assert (offset, casting_mode) in ((0.0, "llama"), (1.0, "gemma")) and not in_place
        return norm.by_torch(X, W, eps, centred=offset == 1.0)


class LigerFusedGateUpSiLUMulFunction:
    """As `liger_kernel.ops.swiglu` has it; values are the learner's own gate."""

    @staticmethod
    def apply(y: Tensor) -> Any:
        assert y.dim() == 2, "the gradient comes back as rows"
        return gated.by_torch(y, gated.SILU)


PACKAGES: dict[str, dict[str, dict[str, Any]]] = {
    "flash3": {"flash_attn_interface": {"flash_attn_varlen_func": flash_attn_varlen_func}},
    "te": {"transformer_engine": {}, "transformer_engine.pytorch": {"DotProductAttention": DotProductAttention}},
    "liger": {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": LigerRMSNormFunction},
        "liger_kernel.ops.swiglu": {"LigerFusedGateUpSiLUMulFunction": LigerFusedGateUpSiLUMulFunction},
    },
}


@contextmanager
def installed(*packages: str) -> Iterator[None]:
    """Have these packages installed inside, by stand-ins. Megatron must be imported before: it would use them too."""
    assert "megatron.core" in sys.modules
    names = []
    for package in packages:
        for name, values in PACKAGES[package].items():
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None, is_package=True)
            module.__dict__.update(values, __path__=[])
            sys.modules[name] = module
            names.append(name)
    caches: tuple[Any, ...] = (packs._flash3, packs._dot_product, packs.problem)
    for cached in caches:
        cached.cache_clear()
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
