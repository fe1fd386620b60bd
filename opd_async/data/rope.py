"""Find which scaling of rotary angles a model's `config.json` asks for, and whether the embedded engine can compute it.

The engine computes a sequence in parts, and packs parts of several sequences into one call. With some scalings the
angles of all tokens depend on the length of the call: logprobs would then depend on how a sequence was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

FIXED = ("default", "linear", "llama3", "yarn", "proportional")
"""Scalings whose angles depend on the position alone. Those that do not are `dynamic` and `longrope`."""


def rope_types(config: Mapping[str, Any]) -> Iterator[str]:
    """List the scalings that a `config.json` names, text models inside it included; empty for a model without."""
    for key in ("rope_parameters", "rope_scaling"):
        yield from _named(config.get(key))
    if isinstance(inner := config.get("text_config"), Mapping):
        yield from rope_types(inner)


def _named(options: Any) -> Iterator[str]:
    """List the `rope_type` of one scaling, or of the scaling of each kind of layer; older files write `type`."""
    if not isinstance(options, Mapping):
        return
    name = options.get("rope_type") or options.get("type")
    if isinstance(name, str):
        yield name
    for value in options.values():
        yield from _named(value)


def rope_problem(config: Mapping[str, Any]) -> str | None:
    """Say why the embedded engine cannot run a model with this `config.json`, and what to do; None if it can."""
    wrong = [name for name in rope_types(config) if name not in FIXED]
    if not wrong:
        return None
    return (
        f"rope_type {wrong[0]}, whose angles depend on the length of a call, so that scores would depend on how a "
        f"sequence is cut; the embedded engine takes {', '.join(FIXED)}: give such a model, or engines of another kind"
    )
