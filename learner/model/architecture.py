"""Read the `config.json` of a Hugging Face folder into the few numbers that shape a decoder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_async.learner.errors import ModelError

ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "Qwen3MoeForCausalLM": "qwen3_moe",
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


def read_shape(model_path: Path) -> ModelShape:
    """The shape of the model in `model_path`; `ModelError` names the key that is missing or not supported."""
    path = model_path / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}; models.student.path must be a Hugging Face folder") from error
    try:
        return _shape(raw)
    except KeyError as error:
        raise ModelError(f"{path} has no key {error}; it is not the config of a decoder") from error
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _shape(raw: dict[str, Any]) -> ModelShape:
    architecture = (raw.get("architectures") or ["none"])[0]
    family = ARCHITECTURES.get(architecture)
    if family is None:
        raise ModelError(f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(raw, family)
    heads = int(raw["num_attention_heads"])
    return ModelShape(
        architecture=architecture,
        layers=int(raw["num_hidden_layers"]),
        hidden=int(raw["hidden_size"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
        ffn=int(raw["intermediate_size"]),
        vocab=int(raw["vocab_size"]),
        norm_eps=float(raw["rms_norm_eps"]),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        qkv_bias=family == "qwen2",
        max_positions=int(raw["max_position_embeddings"]),
        rope=_rope(raw),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        experts=_experts(raw) if family == "qwen3_moe" else None,
    )


def _experts(raw: dict[str, Any]) -> ExpertShape:
    """Every layer must have experts: dense layers in between are refused."""
    if raw.get("mlp_only_layers") or int(raw.get("decoder_sparse_step", 1)) != 1:
        raise ModelError("mlp_only_layers and decoder_sparse_step other than 1 are not supported")
    count = raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"]
    return ExpertShape(
        count=int(count),
        per_token=int(raw["num_experts_per_tok"]),
        ffn=int(raw["moe_intermediate_size"]),
        normalised=bool(raw.get("norm_topk_prob", False)),
    )


def _refuse_unsupported(raw: dict[str, Any], family: str) -> None:
    """Options that would change the arithmetic are refused rather than ignored."""
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {raw['hidden_act']} is not supported (only silu)")
    if raw.get("use_sliding_window"):
        raise ModelError("use_sliding_window is not supported")
    if raw.get("mlp_bias") or (raw.get("attention_bias") and family != "qwen2"):
        raise ModelError("mlp_bias and attention_bias are not supported")


def _rope(raw: dict[str, Any]) -> RopeShape:
    """Both spellings: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5)."""
    options: dict[str, Any] = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(options.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = str(options.get("rope_type") or options.get("type") or "default")
    if kind == "default":
        return RopeShape(theta=theta)
    if kind == "linear":
        return RopeShape(theta=theta, kind=kind, factor=float(options["factor"]))
    if kind == "llama3":
        return RopeShape(
            theta=theta,
            kind=kind,
            factor=float(options["factor"]),
            low_freq_factor=float(options["low_freq_factor"]),
            high_freq_factor=float(options["high_freq_factor"]),
            original_positions=int(options["original_max_position_embeddings"]),
        )
    raise ModelError(f"rope type {kind} is not supported (only default, linear, llama3)")
