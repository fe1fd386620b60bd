"""Which tensors the folder of a decoder holds: the names and shapes that its `config.json` announces."""

from __future__ import annotations

from opd_async.data.decoder import ModelShape

Shape = tuple[int, ...]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def decoder_tensors(shape: ModelShape) -> dict[str, Shape]:
    """Name and shape of every tensor, in the order of the network. A tied LM head is not among them."""
    tensors: dict[str, Shape] = {EMBEDDING: (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}": size for name, size in _layer(shape).items()}
    tensors["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        tensors[HEAD] = (shape.vocab, shape.hidden)
    return tensors


def _layer(shape: ModelShape) -> dict[str, Shape]:
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, queries),
    }
    if shape.gemma:
        tensors |= {f"{when}_feedforward_layernorm.weight": (hidden,) for when in ("pre", "post")}
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        tensors[f"self_attn.{name}_proj.weight"] = (rows, hidden)
        if shape.qkv_bias:
            tensors[f"self_attn.{name}_proj.bias"] = (rows,)
    if shape.qk_norm:
        tensors |= {f"self_attn.{name}_norm.weight": (shape.head_dim,) for name in "qk"}
    if shape.experts is None:
        return tensors | _gated("mlp.", hidden, shape.ffn)
    tensors["mlp.gate.weight"] = (shape.experts.count, hidden)
    for expert in range(shape.experts.count):
        tensors |= _gated(f"mlp.experts.{expert}.", hidden, shape.experts.ffn)
    return tensors


def _gated(prefix: str, hidden: int, ffn: int) -> dict[str, Shape]:
    sizes: dict[str, Shape] = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    return {f"{prefix}{name}.weight": size for name, size in sizes.items()}
