"""Read single numbers of a `config.json`, or say which one is no number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_async.errors import InputError


def size(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number above zero; `default`, if there is one, stands for a key that is missing or null.

    Raises `InputError` for any other value, and `KeyError` for a missing key without a default.
    """
    value = raw[key] if default is None else raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key} is {value!r}, not a whole number above 0; give a complete config")
    return value


def number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number above zero; missing keys and errors as in `size`."""
    value = raw[key] if default is None else raw.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise InputError(f"{key} is {value!r}, not a number above 0; give a complete config")
    return float(value)
