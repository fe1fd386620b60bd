"""What a decoder's `config.json` says of rotary angles: base period and scaling, for all layers or for each kind.

    rope_theta + rope_scaling (transformers 4)  or  rope_parameters (transformers 5)  ->  RopeShape

Options that would change the arithmetic and are not known here are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_async.data.config_values import number, size
from opd_async.errors import InputError

FULL, WINDOWED = "full_attention", "sliding_attention"
"""What configs call the two kinds of layers."""
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
}
_MOST_FACTOR = 1e6
"""A larger factor of YaRN is a mistake in the file."""
_FULL_THETA, _WINDOWED_THETA = 1_000_000.0, 10_000.0
"""Gemma 3's base periods where its config names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeShape:
    """Rotary embedding: base period and the optional scaling of `rope_scaling` / `rope_parameters`."""

    theta: float
    kind: str = "default"
    """`default`, `linear`, `llama3` or `yarn`."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    """Of `llama3` and `yarn`: the positions that the model was trained on before it was stretched."""
    beta_fast: float = 32.0
    """Of `yarn`: channels that turn more often than this over the original positions are left alone."""
    beta_slow: float = 1.0
    """Of `yarn`: channels that turn less often than this are divided by `factor`."""
    whole_channels: bool = True
    """Of `yarn`: the two borders are rounded to whole channels."""
    magnitude: float = 1.0
    """Of `yarn`: queries and keys are multiplied by this, so that attention over more positions stays as sharp."""


def rope_shapes(raw: Mapping[str, Any], *, by_layer: bool) -> tuple[RopeShape, RopeShape | None]:
    """The rope of a config, and that of its windowed layers where `by_layer` says that they have one of their own.

    Raises `InputError` for a scaling or an option that is not known, and for ropes by layer where there is one for all.
    """
    options = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(options, Mapping):
        raise InputError(f"rope_parameters is {options!r}, not a mapping; give a complete config")
    nested = any(isinstance(value, Mapping) for value in options.values())
    if not by_layer:
        if nested:
            raise InputError("rope_parameters that differ between layers are not supported; one rope for all layers is")
        return _rope(raw, options, number(raw, "rope_theta", 10_000.0)), None
    full, windowed = (options.get(FULL), options.get(WINDOWED)) if nested else (options, None)
    thetas = number(raw, "rope_theta", _FULL_THETA), number(raw, "rope_local_base_freq", _WINDOWED_THETA)
    ropes = [_rope(raw, own or {}, theta) for own, theta in zip((full, windowed), thetas, strict=True)]
    if any(not rope.whole_channels for rope in ropes):
        raise InputError("truncate: false in a rope for some layers is not supported")
    return ropes[0], ropes[1]


def _rope(raw: Mapping[str, Any], options: Any, theta: float) -> RopeShape:
    """One rope; `theta` stands for a missing `rope_theta`."""
    if not isinstance(options, Mapping):
        raise InputError(f"rope_parameters has {options!r}, not a mapping, for one kind of layer")
    theta = number(options, "rope_theta", theta)
    kind = str(options.get("rope_type") or options.get("type") or "default")
    if kind not in _KEYS:
        raise InputError(f"rope type {kind} is not supported (only {', '.join(_KEYS)})")
    allowed = {"rope_type", "type", "rope_theta", *_KEYS[kind]}
    if unknown := [key for key, value in options.items() if key not in allowed and not _neutral(key, value)]:
        raise InputError(f"{', '.join(sorted(unknown))} of rope type {kind} is not supported")
    if kind == "linear":
        return RopeShape(theta=theta, kind=kind, factor=number(options, "factor"))
    if kind == "llama3":
        return RopeShape(
            theta=theta,
            kind=kind,
            factor=number(options, "factor"),
            low_freq_factor=number(options, "low_freq_factor"),
            high_freq_factor=number(options, "high_freq_factor"),
            original_positions=size(options, "original_max_position_embeddings"),
        )
    return _yarn(raw, options, theta) if kind == "yarn" else RopeShape(theta=theta)


def _yarn(raw: Mapping[str, Any], options: Mapping[str, Any], theta: float) -> RopeShape:
    """YaRN (Peng et al., 2023), with transformers' defaults for what a config leaves out."""
    own = size(options, "original_max_position_embeddings", size(raw, "max_position_embeddings"))
    factor, truncate = number(options, "factor"), options.get("truncate", True)
    if not isinstance(truncate, bool):
        raise InputError(f"truncate is {truncate!r}, not true or false; give a complete config")
    return RopeShape(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_positions=size(raw, "original_max_position_embeddings", own),
        beta_fast=number(options, "beta_fast", 32.0),
        beta_slow=number(options, "beta_slow", 1.0),
        whole_channels=truncate,
        magnitude=number(options, "attention_factor", _magnitude(options, factor)),
    )


def _magnitude(options: Mapping[str, Any], factor: float) -> float:
    """YaRN's multiplier of queries and keys where the config names none: 0.1 ln(factor) + 1, or a quotient of two."""
    if options.get("mscale") and options.get("mscale_all_dim"):
        return _grown(factor, number(options, "mscale")) / _grown(factor, number(options, "mscale_all_dim"))
    return _grown(factor, 1.0)


def _grown(factor: float, share: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0


def positions(raw: Mapping[str, Any]) -> int:
    """How many tokens a model has positions for: `max_position_embeddings`, or what YaRN stretches it to.

    Configs with YaRN name either number under `max_position_embeddings`. Raises `InputError` if it is not a number.
    """
    most = size(raw, "max_position_embeddings")
    options = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(options, Mapping) or "yarn" not in (options.get("rope_type"), options.get("type")):
        return most
    original, factor = options.get("original_max_position_embeddings"), options.get("factor")
    if not isinstance(original, int) or not isinstance(factor, int | float) or not 0 < factor < _MOST_FACTOR:
        return most
    return max(most, int(original * factor))


def _neutral(key: str, value: object) -> bool:
    """Options that are written although they change nothing."""
    return value is None or (key == "partial_rotary_factor" and value == 1) or key == "original_max_position_embeddings"
