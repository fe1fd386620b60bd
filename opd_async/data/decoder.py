"""What a decoder's `config.json` means: the one reader for the checks before a start and for the learner.

    config.json -> refused, where it asks for arithmetic that the learner does not do -> ModelShape

Nothing that changes the arithmetic is passed over: what is not known here is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_async.data.json_object import read_object
from opd_async.errors import InputError

ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
DTYPES = ("float32", "bfloat16", "float16")
_WINDOWS_BY_KEY = ("qwen2", "qwen3", "qwen3_moe")
"""Families whose `use_sliding_window` is obeyed by their own code; llama has no windows."""
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeShape:
    """Rotary embedding: base period and the optional scaling of `rope_scaling` / `rope_parameters`."""

    theta: float
    kind: str = "default"
    """`default`, `linear` or `llama3`."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


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
    """The shape of a Qwen3, Qwen2, Llama or Qwen3-MoE decoder. Sizes are those of the whole model, not of a shard."""

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
    heads, hidden = _size(raw, "num_attention_heads"), _size(raw, "hidden_size")
    return ModelShape(
        architecture=architecture,
        layers=_size(raw, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=_size(raw, "num_key_value_heads", heads),
        head_dim=_size(raw, "head_dim", hidden // heads),
        ffn=_size(raw, "intermediate_size"),
        vocab=_size(raw, "vocab_size"),
        norm_eps=_number(raw, "rms_norm_eps"),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=family == "qwen2",
        max_positions=_size(raw, "max_position_embeddings"),
        rope=_rope(raw),
        dtype=_dtype(raw),
        experts=_experts(raw) if family == "qwen3_moe" else None,
    )


def _size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number above zero; `default`, if there is one, stands for a key that is missing or null."""
    value = raw[key] if default is None else raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key} is {value!r}, not a whole number above 0; give a complete config")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw[key] if default is None else raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise InputError(f"{key} is {value!r}, not a number above 0; give a complete config")
    return float(value)


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
        count=_size(raw, "num_experts" if "num_experts" in raw else "num_local_experts"),
        per_token=_size(raw, "num_experts_per_tok"),
        ffn=_size(raw, "moe_intermediate_size"),
        normalised=bool(raw.get("norm_topk_prob", False)),
    )


def _refuse_unsupported(raw: Mapping[str, Any], family: str) -> None:
    """Options that would change the arithmetic are refused rather than ignored."""
    if problem := quantised(raw):
        raise InputError(problem)
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"hidden_act {raw['hidden_act']} is not supported (only silu)")
    if _windowed_layers(raw, family):
        raise InputError("layers with a sliding window (use_sliding_window, layer_types) are not supported")
    if raw.get("mlp_bias") or (raw.get("attention_bias") and family != "qwen2"):
        raise InputError("mlp_bias and attention_bias are not supported")
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


def _windowed_layers(raw: Mapping[str, Any], family: str) -> bool:
    """Whether any layer sees a window only, by the rules of the family's own code."""
    kinds = raw.get("layer_types")
    if isinstance(kinds, list):
        return any(kind != "full_attention" for kind in kinds)
    if family not in _WINDOWS_BY_KEY or not raw.get("use_sliding_window") or raw.get("sliding_window", 4096) is None:
        return False
    first = raw.get("max_window_layers", 28)
    return not isinstance(first, int) or first < _size(raw, "num_hidden_layers")


def _rope(raw: Mapping[str, Any]) -> RopeShape:
    """Both spellings: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
    options = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(options, dict) or any(isinstance(value, dict) for value in options.values()):
        raise InputError("rope_parameters that differ between layers are not supported; one rope for all layers is")
    theta = _number(options, "rope_theta", _number(raw, "rope_theta", 10000.0))
    kind = str(options.get("rope_type") or options.get("type") or "default")
    if kind not in _ROPE_KEYS:
        raise InputError(f"rope type {kind} is not supported (only {', '.join(_ROPE_KEYS)})")
    allowed = {"rope_type", "type", "rope_theta", *_ROPE_KEYS[kind]}
    if unknown := [key for key, value in options.items() if key not in allowed and not _neutral(key, value)]:
        raise InputError(f"{', '.join(sorted(unknown))} of rope type {kind} is not supported")
    if kind == "linear":
        return RopeShape(theta=theta, kind=kind, factor=_number(options, "factor"))
    if kind == "llama3":
        return RopeShape(
            theta=theta,
            kind=kind,
            factor=_number(options, "factor"),
            low_freq_factor=_number(options, "low_freq_factor"),
            high_freq_factor=_number(options, "high_freq_factor"),
            original_positions=_size(options, "original_max_position_embeddings"),
        )
    return RopeShape(theta=theta)


def _neutral(key: str, value: object) -> bool:
    """Options that are written although they change nothing."""
    return value is None or (key == "partial_rotary_factor" and value == 1) or key == "original_max_position_embeddings"
