"""Which layers of a decoder see a window of the last tokens only, by the rules of each family's own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_async.data.config_values import size
from opd_async.data.rope_shape import FULL, WINDOWED
from opd_async.errors import InputError

_DEFAULT_WINDOW = 4096
"""Of Qwen2, Qwen3, Mistral and Gemma 3, where a config has no `sliding_window` at all."""
_DEFAULT_FIRST = 28
"""Of Qwen2 and Qwen3: the first layer with a window, where a config does not say it."""
_DEFAULT_PATTERN = 6
"""Of Gemma 3: every sixth layer sees everything."""


def windows(raw: Mapping[str, Any], family: str) -> tuple[int | None, frozenset[int]]:
    """Tokens of the window (None: no layer has one) and the layers that have it, counted from 0.

    Raises `InputError` for a config whose keys contradict each other, and for windows of a family that has none.
    """
    layers = size(raw, "num_hidden_layers")
    kinds = _kinds(raw, layers)
    if family == "gemma3":
        every = size(raw, "sliding_window_pattern", _DEFAULT_PATTERN)
        chosen = kinds if kinds is not None else {layer for layer in range(layers) if (layer + 1) % every}
        return _window(raw, chosen)
    if family == "mistral":
        chosen = set() if raw.get("sliding_window", _DEFAULT_WINDOW) is None else set(range(layers))
        if kinds is not None and kinds != chosen:
            raise InputError(
                "layer_types of Mistral that differ from sliding_window are not supported; one window for all layers is"
            )
        return _window(raw, chosen)
    if family not in ("qwen2", "qwen3"):
        if kinds or (family == "qwen3_moe" and raw.get("use_sliding_window")):
            raise InputError("layers with a sliding window (use_sliding_window, layer_types) are not supported here")
        return None, frozenset()
    if not raw.get("use_sliding_window") or raw.get("sliding_window", _DEFAULT_WINDOW) is None:
        if kinds:
            raise InputError("layer_types names sliding_attention, but use_sliding_window or sliding_window is not set")
        return None, frozenset()
    if kinds is None:
        first = raw.get("max_window_layers", _DEFAULT_FIRST)
        if not isinstance(first, int) or first < 0:
            raise InputError(f"max_window_layers is {first!r}, not a whole number; give a complete config")
        kinds = set(range(first, layers))
    return _window(raw, kinds)


def _kinds(raw: Mapping[str, Any], layers: int) -> set[int] | None:
    """The layers that `layer_types` gives a window; None where there is no such list."""
    kinds = raw.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (FULL, WINDOWED) for kind in kinds):
        raise InputError(f"layer_types is not a list of {layers} times {FULL} or {WINDOWED}; give a complete config")
    return {layer for layer, kind in enumerate(kinds) if kind == WINDOWED}


def _window(raw: Mapping[str, Any], chosen: set[int]) -> tuple[int | None, frozenset[int]]:
    return (size(raw, "sliding_window", _DEFAULT_WINDOW), frozenset(chosen)) if chosen else (None, frozenset())
