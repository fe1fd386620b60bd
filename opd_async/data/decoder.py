"""What a decoder's `config.json` means: the one reader for the checks before a start and for the learner.

    config.json -> refused, where it asks for arithmetic that the learner does not do -> ModelShape

Nothing that changes the arithmetic is passed over: what is not known here is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_async.data.config_values import number, size
from opd_async.data.json_object import read_object
from opd_async.data.layer_windows import windows
from opd_async.data.rope_shape import RopeShape, positions, rope_shapes
from opd_async.errors import InputError

ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Gemma3ForCausalLM": "gemma3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
DTYPES = ("float32", "bfloat16", "float16")
SILU, GELU = "silu", "gelu_pytorch_tanh"
"""Activations of gated MLPs, as configs call them; GELU by its approximation with tanh."""
_TIED = ("gemma3", "gemma3_text")
"""Model types that share the embedding with the LM head unless their config says otherwise."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """A mixture of experts in place of every layer's MLP: `per_token` of `count` gated MLPs of `ffn` channels."""

    count: int
    per_token: int
    ffn: int
    normalised: bool
    """The weights of a token's experts add up to 1: softmax over the chosen ones, not over all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The shape of a decoder of `ARCHITECTURES`. Sizes are those of the whole model, not of a shard."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    norm_eps: float
    tied: bool
    qk_norm: bool
    qkv_bias: bool
    max_positions: int
    rope: RopeShape
    dtype: str
    """Torch name of the dtype of the stored weights, which is also the engines': `bfloat16`, ..."""
    experts: ExpertShape | None = None
    """None for a dense model; `ffn` is then the width of its MLP."""
    activation: str = SILU
    """`silu` or `gelu_pytorch_tanh`."""
    window: int | None = None
    """Tokens that a position of a windowed layer sees, itself included; None where no layer has a window."""
    windowed: frozenset[int] = frozenset()
    """The layers that have a window, counted from 0."""
    window_rope: RopeShape | None = None
    """The rope of windowed layers, where it is another one than `rope`."""
    query_scalar: float | None = None
    """Scores of attention are divided by the root of this; None: of `head_dim`."""
    gemma: bool = False
    """Gemma's arithmetic: embeddings times the root of `hidden`, norms that store their weights less 1, and norms
    behind attention and MLP as well as before them."""

    def rope_of(self, layer: int) -> RopeShape:
        """The rope of a layer, counted from 0."""
        return self.window_rope if self.window_rope is not None and layer in self.windowed else self.rope

    def score_scale(self, layer: int) -> float:
        """What the scores of a layer's attention are multiplied by.

        YaRN's multiplier of queries and keys is part of it, squared: every channel turns, so the product is the same.
        """
        return self.rope_of(layer).magnitude ** 2 / math.sqrt(self.query_scalar or self.head_dim)


def read_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder`; `InputError` names the key that is missing, malformed or not supported."""
    path = folder / "config.json"
    raw = read_object(path)
    try:
        return _shape(raw)
    except KeyError as error:
        raise InputError(f"{path} has no key {error}; it is not the config of a decoder") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _shape(raw: Mapping[str, Any]) -> ModelShape:
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else "none"
    family = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise InputError(f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(raw, family)
    heads, hidden, gemma = size(raw, "num_attention_heads"), size(raw, "hidden_size"), family == "gemma3"
    rope, window_rope = rope_shapes(raw, by_layer=gemma)
    window, windowed = windows(raw, family)
    return ModelShape(
        architecture=architecture,
        layers=size(raw, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=size(raw, "num_key_value_heads", heads),
        head_dim=size(raw, "head_dim", 256 if gemma else hidden // heads),
        ffn=size(raw, "intermediate_size"),
        vocab=size(raw, "vocab_size"),
        norm_eps=number(raw, "rms_norm_eps"),
        tied=is_tied(raw),
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3"),
        qkv_bias=family == "qwen2",
        max_positions=positions(raw),
        rope=rope,
        dtype=_dtype(raw),
        experts=_experts(raw) if family == "qwen3_moe" else None,
        activation=GELU if gemma else SILU,
        window=window,
        windowed=windowed,
        window_rope=window_rope,
        query_scalar=number(raw, "query_pre_attn_scalar", 256.0) if gemma else None,
        gemma=gemma,
    )


def is_tied(raw: Mapping[str, Any]) -> bool:
    """Whether a config's model has its embedding for an LM head."""
    return bool(raw.get("tie_word_embeddings", raw.get("model_type") in _TIED))


def _dtype(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype {name} is not supported (only {', '.join(DTYPES)}); give a folder with plain weights")
    return name


def _experts(raw: Mapping[str, Any]) -> ExpertShape:
    """Every layer must have experts: dense layers in between are refused."""
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        raise InputError("mlp_only_layers and decoder_sparse_step other than 1 are not supported")
    return ExpertShape(
        count=size(raw, "num_experts" if "num_experts" in raw else "num_local_experts"),
        per_token=size(raw, "num_experts_per_tok"),
        ffn=size(raw, "moe_intermediate_size"),
        normalised=bool(raw.get("norm_topk_prob", False)),
    )


def _refuse_unsupported(raw: Mapping[str, Any], family: str) -> None:
    """Options that would change the arithmetic are refused rather than ignored."""
    if problem := quantised(raw):
        raise InputError(problem)
    own = {"hidden_activation": GELU} if family == "gemma3" else {"hidden_act": SILU}
    for key, known in own.items():
        if raw.get(key, known) != known:
            raise InputError(f"{key} {raw[key]} is not supported (only {known})")
    if raw.get("mlp_bias") or (raw.get("attention_bias") and family != "qwen2"):
        raise InputError("mlp_bias and attention_bias are not supported")
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        if family == "gemma3" and raw.get(key):
            raise InputError(f"{key} {raw[key]} is not supported (only null)")
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise InputError(f"partial_rotary_factor {raw['partial_rotary_factor']} is not supported (only 1)")


def quantised(raw: Mapping[str, Any]) -> str | None:
    """What a config says of quantised weights, whose codes mean nothing without their scales; None if nothing."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if raw.get(key) is not None:
            own = raw[key]
            method = own.get("quant_method") if isinstance(own, dict) else None
            kind = f" ({method})" if isinstance(method, str) else ""
            return f"{key}{kind}: quantised weights are not supported; give a folder with plain weights"
    return None
