"""Names and shapes of a Hugging Face checkpoint against those of Megatron's parameters.

One `Slot` per Megatron parameter says which Hugging Face tensors it holds and how a tensor-parallel rank's part is cut
out of them (`split`) and put back together (`join`). Both directions are pure reshaping: bit-exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from opd_async.learner.model.architecture import ModelShape

Split = Callable[[Sequence[Tensor], int, int], Tensor]
"""(full Hugging Face tensors, tensor rank, tensor size) -> this rank's part."""
Join = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""Parts of all tensor ranks, in rank order -> full Hugging Face tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One Megatron parameter."""

    stage: int
    """Pipeline stage that holds it."""
    name: str
    """Megatron's name on that stage."""
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    split: Split
    join: Join
    sharded: bool = True
    """False for a tensor that every tensor-parallel rank holds whole."""
    holder: int | None = None
    """Expert-parallel rank that holds it; None where all do."""


def slots(shape: ModelShape, pipeline_size: int, expert_size: int = 1) -> list[Slot]:
    """All parameters of the model, in the order of the network. A tied LM head has no slot of its own.

    Experts are dealt to expert-parallel ranks in runs, and each rank numbers its own from 0.
    """
    per_stage = shape.layers // pipeline_size
    last = pipeline_size - 1
    result = [_vocab_rows(shape, 0, "embedding.word_embeddings.weight", "model.embed_tokens.weight")]
    for layer in range(shape.layers):
        stage, local = divmod(layer, per_stage)
        result += _layer(shape, stage, f"decoder.layers.{local}.", f"model.layers.{layer}.", expert_size)
    result.append(_whole(last, "decoder.final_layernorm.weight", "model.norm.weight", shape.hidden))
    if not shape.tied:
        result.append(_vocab_rows(shape, last, "output_layer.weight", "lm_head.weight"))
    return result


def _layer(shape: ModelShape, stage: int, ours: str, theirs: str, expert_size: int) -> list[Slot]:
    attention, attn, hidden = f"{ours}self_attention.", f"{theirs}self_attn.", shape.hidden
    result = [
        _whole(stage, f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", hidden),
        _qkv(shape, stage, f"{attention}linear_qkv.", attn, "weight"),
        _columns(
            stage, f"{attention}linear_proj.weight", f"{attn}o_proj.weight", (hidden, shape.heads * shape.head_dim)
        ),
        *_norms_around_mlp(shape, stage, ours, theirs),
        *_mlp(shape, stage, f"{ours}mlp.", f"{theirs}mlp.", expert_size),
    ]
    if shape.qkv_bias:
        result.insert(2, _qkv(shape, stage, f"{attention}linear_qkv.", attn, "bias"))
    if shape.qk_norm:
        result.insert(2, _whole(stage, f"{attention}q_layernorm.weight", f"{attn}q_norm.weight", shape.head_dim))
        result.insert(3, _whole(stage, f"{attention}k_layernorm.weight", f"{attn}k_norm.weight", shape.head_dim))
    return result


def _norms_around_mlp(shape: ModelShape, stage: int, ours: str, theirs: str) -> list[Slot]:
    """The norm before the MLP; with Gemma's, which has other names, those behind attention and MLP as well."""
    names = {f"{ours}pre_mlp_layernorm.weight": f"{theirs}post_attention_layernorm.weight"}
    if shape.gemma:
        names = {
            f"{ours}self_attention.linear_proj.post_norm.weight": f"{theirs}post_attention_layernorm.weight",
            f"{ours}pre_mlp_layernorm.weight": f"{theirs}pre_feedforward_layernorm.weight",
            f"{ours}mlp.linear_fc2.post_norm.weight": f"{theirs}post_feedforward_layernorm.weight",
        }
    return [_whole(stage, name, hf_name, shape.hidden) for name, hf_name in names.items()]


def _mlp(shape: ModelShape, stage: int, ours: str, theirs: str, expert_size: int) -> list[Slot]:
    """A layer's MLP; with experts, its router and then one MLP per expert."""
    if shape.experts is None:
        return _gated(shape.hidden, shape.ffn, stage, ours, theirs)
    router = _whole(stage, f"{ours}router.weight", f"{theirs}gate.weight", shape.experts.count, shape.hidden)
    result = [router]
    for expert in range(shape.experts.count):
        holder, local = divmod(expert, shape.experts.count // expert_size)
        ours_here, theirs_here = f"{ours}experts.local_experts.{local}.", f"{theirs}experts.{expert}."
        own = _gated(shape.hidden, shape.experts.ffn, stage, ours_here, theirs_here)
        result += [replace(slot, holder=holder) for slot in own]
    return result


def _gated(hidden: int, ffn: int, stage: int, ours: str, theirs: str) -> list[Slot]:
    return [
        _gate_up(hidden, ffn, stage, f"{ours}linear_fc1.weight", theirs),
        _columns(stage, f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", (hidden, ffn)),
    ]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The ranks' parts as one tensor; that of a single rank is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _whole(stage: int, name: str, hf_name: str, *size: int) -> Slot:
    """The same tensor on every tensor-parallel rank."""
    return Slot(
        stage=stage,
        name=name,
        hf_names=(hf_name,),
        hf_shapes=(size,),
        split=lambda full, *_: full[0],
        join=lambda parts: (parts[0],),
        sharded=False,
    )


def _columns(stage: int, name: str, hf_name: str, hf_shape: tuple[int, int]) -> Slot:
    """Input channels split over ranks."""
    return Slot(
        stage=stage,
        name=name,
        hf_names=(hf_name,),
        hf_shapes=(hf_shape,),
        split=lambda full, rank, size: full[0].chunk(size, dim=1)[rank],
        join=lambda parts: (_joined(parts, dim=1),),
    )


def _vocab_rows(shape: ModelShape, stage: int, name: str, hf_name: str) -> Slot:
    """Vocabulary rows split over ranks; rows past the vocabulary are zero and are not written back."""

    def split(full: Sequence[Tensor], rank: int, size: int) -> Tensor:
        padding = -(-shape.vocab // size) * size - shape.vocab
        return functional.pad(full[0], (0, 0, 0, padding)).chunk(size)[rank]

    def join(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (_joined(parts)[: shape.vocab],)

    hf_shapes = ((shape.vocab, shape.hidden),)
    return Slot(stage=stage, name=name, hf_names=(hf_name,), hf_shapes=hf_shapes, split=split, join=join)


def _gate_up(hidden: int, ffn: int, stage: int, name: str, theirs: str) -> Slot:
    """Each rank holds its rows of the gate, then its rows of the up projection."""

    def split(full: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return torch.cat([tensor.chunk(size)[rank] for tensor in full])

    def join(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        halves = [part.chunk(2) for part in parts]
        return tuple(_joined([half[index] for half in halves]) for index in range(2))

    hf_names = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    hf_shapes = ((ffn, hidden),) * 2
    return Slot(stage=stage, name=name, hf_names=hf_names, hf_shapes=hf_shapes, split=split, join=join)


def _qkv(shape: ModelShape, stage: int, ours: str, theirs: str, kind: str) -> Slot:
    """Megatron interleaves by KV head: the query heads that share it, the key head, the value head.

    Ranks split the KV heads. `kind` is `weight` or `bias`.
    """
    rows = (shape.heads // shape.kv_heads * shape.head_dim, shape.head_dim, shape.head_dim)
    inputs = (shape.hidden,) if kind == "weight" else ()

    def split(full: Sequence[Tensor], rank: int, size: int) -> Tensor:
        per_kv_head = [t.unflatten(0, (shape.kv_heads, n)).chunk(size)[rank] for t, n in zip(full, rows, strict=True)]
        return torch.cat(per_kv_head, dim=1).flatten(0, 1)

    def join(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        per_kv_head = _joined([part.unflatten(0, (-1, sum(rows))) for part in parts])
        return tuple(tensor.flatten(0, 1) for tensor in per_kv_head.split(rows, dim=1))

    hf_names = tuple(f"{theirs}{name}_proj.{kind}" for name in "qkv")
    hf_shapes = tuple((shape.kv_heads * n, *inputs) for n in rows)
    return Slot(stage=stage, name=f"{ours}{kind}", hf_names=hf_names, hf_shapes=hf_shapes, split=split, join=join)
