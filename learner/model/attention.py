"""Causal attention over packed sequences, for Megatron's layer spec.

Shapes: P packed tokens, H query heads and G key/value heads of this rank, E channels per head. With context parallelism
P are this rank's tokens; keys and values are gathered from the other ranks of its group.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn import functional

from opd_async.learner.model.architecture import ModelShape
from opd_async.learner.model.context import Piece, Segment
from opd_async.learner.model.layout import Packing

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
        shape: ModelShape,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        layer = layer_number - 1
        self.scale = shape.score_scale(layer)
        self.window = shape.window if layer in shape.windowed else None
        self.kernel = config.kernels.attention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        packed_seq_params: Packing,
        **_unused: Any,
    ) -> Tensor:
        """`query` [P, 1, H, E], `key` and `value` [P, 1, G, E] -> [P, 1, H * E]."""
        query_PHE, key_PGE, value_PGE = query[:, 0], key[:, 0], value[:, 0]
        if packed_seq_params.pieces[0].keys is not None:
            group = parallel_state.get_context_parallel_group()
            # the way back scatters and adds up what every rank's queries have asked of a key
            key_PGE = gather_from_sequence_parallel_region(key_PGE.contiguous(), group=group)
            value_PGE = gather_from_sequence_parallel_region(value_PGE.contiguous(), group=group)
        attend = self._varlen if has_varlen(query.device, query.dtype) else self._grouped
        outputs = []
        for piece in packed_seq_params.pieces:
            keys, values = (t if piece.keys is None else t[piece.keys] for t in (key_PGE, value_PGE))
            outputs.append(attend(query_PHE, keys, values, piece))
        output_PHE = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output_PHE.reshape(query.shape[0], 1, -1)

    def _varlen(self, query_PHE: Tensor, keys: Tensor, values: Tensor, piece: Piece) -> Tensor:
        first = piece.segments[0].start
        end = piece.segments[-1].start + piece.segments[-1].count * piece.segments[-1].length
        output: Tensor = self.kernel(query_PHE[first:end], keys, values, piece, scale=self.scale, window=self.window)
        return output

    def _grouped(self, query_PHE: Tensor, keys: Tensor, values: Tensor, piece: Piece) -> Tensor:
        """One call per group of sequences that share a slot length; the views cost nothing.

        On CUDA, keys and values are repeated for the heads that share them: only flash attention shares them there, and
        it takes no float32. The kernel for anything would need memory of T^2.
        """
        sharing = query_PHE.shape[1] // keys.shape[1]
        if query_PHE.is_cuda and sharing > 1:
            keys, values = (t.repeat_interleave(sharing, dim=1) for t in (keys, values))
        outputs = []
        for segment in piece.segments:
            query_NHLD = _batched(query_PHE, segment.start, segment.count, segment.length)
            key_NKLD, value_NKLD = (
                _batched(t, segment.first_key, segment.count, segment.reach) for t in (keys, values)
            )
            mask = _mask(segment, self.window, query_PHE.device)
            output_NHLD = functional.scaled_dot_product_attention(
                query_NHLD,
                key_NKLD,
                value_NKLD,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=query_PHE.shape[1] != keys.shape[1],
            )
            outputs.append(output_NHLD.transpose(1, 2).flatten(0, 1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _mask(segment: Segment, window: int | None, device: torch.device) -> Tensor | None:
    """bool[length, reach]: which keys a query sees; None where it is every key up to its own."""
    ahead = segment.reach - segment.length
    narrow = window is not None and window < segment.reach
    if not ahead and not narrow:
        return None
    mask = torch.ones(segment.length, segment.reach, dtype=torch.bool, device=device).tril(ahead)
    return mask.triu(ahead - window + 1) if narrow and window is not None else mask


class LayerRopeAttention(SelfAttention):
    """Self-attention of a model whose layers have one of two ropes: takes its layer's angles of both."""

    def __init__(self, config: Any, submodules: Any, layer_number: int, *, shape: ModelShape, **options: Any) -> None:
        super().__init__(config, submodules, layer_number, **options)
        self.kind = int(layer_number - 1 in shape.windowed)

    def forward(self, *inputs: Any, rotary_pos_emb: Tensor, **options: Any) -> Any:
        """As Megatron's, with `rotary_pos_emb` [2, P, 1, 1, E]: angles of full layers, then of windowed ones."""
        return super().forward(*inputs, rotary_pos_emb=rotary_pos_emb[self.kind], **options)


def _batched(tensor: Tensor, start: int, count: int, length: int) -> Tensor:
    """Tokens from `start` on, [tokens, heads, D], as [count, heads, length, D]."""
    return tensor.narrow(0, start, count * length).unflatten(0, (count, length)).transpose(1, 2)
