"""Causal attention over packed sequences, for Megatron's layer spec.

Shapes: P packed tokens, H query heads and K key/value heads of this rank, D channels per head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional

from learner.layout import Packing

FLASH_DTYPES = (torch.float16, torch.bfloat16)


def has_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """True where one variable-length kernel serves a whole pack, so that the layout needs no padding."""
    return device.type == "cuda" and dtype in FLASH_DTYPES


class PackedAttention(MegatronModule):
    """Drop-in for Megatron's `DotProductAttention`, which refuses packed sequences."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: Packing,
        **_unused: Any,
    ) -> Tensor:
        """`query` [P, 1, H, D], `key` and `value` [P, 1, K, D] -> [P, 1, H * D]."""
        query_PHD, key_PKD, value_PKD = query[:, 0], key[:, 0], value[:, 0]
        if has_varlen(query.device, query.dtype):
            output_PHD = self._varlen(query_PHD, key_PKD, value_PKD, packed_seq_params)
        else:
            output_PHD = self._grouped(query_PHD, key_PKD, value_PKD, packed_seq_params)
        return output_PHD.reshape(query.shape[0], 1, -1)

    def _varlen(self, query_PHD: Tensor, key_PKD: Tensor, value_PKD: Tensor, packing: Packing) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # imports flash attention, CUDA only

        bounds, longest = packing.cu_seqlens, packing.max_length
        output = varlen_attn(
            query_PHD,
            key_PKD,
            value_PKD,
            bounds,
            bounds,
            longest,
            longest,
            scale=self.scale,
            window_size=(-1, 0),
            enable_gqa=query_PHD.shape[1] != key_PKD.shape[1],
        )
        assert isinstance(output, Tensor)  # a tuple only where auxiliary outputs are asked for
        return output

    def _grouped(self, query_PHD: Tensor, key_PKD: Tensor, value_PKD: Tensor, packing: Packing) -> Tensor:
        """One call per group of sequences that share a slot length; the views cost nothing."""
        outputs = []
        for segment in packing.segments:
            query_NHLD, key_NKLD, value_NKLD = (
                tensor.narrow(0, segment.start, segment.count * segment.length)
                .unflatten(0, (segment.count, segment.length))
                .transpose(1, 2)
                for tensor in (query_PHD, key_PKD, value_PKD)
            )
            output_NHLD = functional.scaled_dot_product_attention(
                query_NHLD,
                key_NKLD,
                value_NKLD,
                is_causal=True,
                scale=self.scale,
                enable_gqa=query_PHD.shape[1] != key_PKD.shape[1],
            )
            outputs.append(output_NHLD.transpose(1, 2).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
