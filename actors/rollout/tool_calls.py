"""Calls of tools in what the student says, in the form that Hermes and Qwen templates teach. Pure.

    <tool_call>
    {"name": "add", "arguments": {"a": 1, "b": 2}}
    </tool_call>

A turn with a call that is none, by its JSON or its keys, has no calls: all of it is content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPENS, CLOSES = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What the student wants to have called."""

    name: str
    arguments: Mapping[str, Any]


def parse_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Split a turn into what stands before its first call, and its calls; (text, ()) if there are none.

    The last call may lack its closing tag: the token that ends the turn can stand in its place.
    """
    content, *parts = text.split(OPENS)
    calls = []
    for part in parts:
        inside, _, behind = part.partition(CLOSES)
        call = _call(inside)
        if call is None or behind.strip():
            return text, ()
        calls.append(call)
    return (content.rstrip(), tuple(calls)) if calls else (text, ())


def _call(text: str) -> ToolCall | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    name, arguments = found.get("name"), found.get("arguments", {})
    return ToolCall(name, arguments) if isinstance(name, str) and name and isinstance(arguments, dict) else None
