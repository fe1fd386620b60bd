"""Contents that the files of a model folder might have instead of their own."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
ANY_BYTES = st.binary(max_size=40) | st.text("{}[]\"':,0ab%|-# \n", max_size=40).map(str.encode)


def _values(integers: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.none() | st.booleans() | integers | st.floats() | st.text(max_size=4) | st.just("\ud83d"),
        lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3),
        max_leaves=4,
    )


VALUE = _values(st.integers() | st.sampled_from([10**30, -1]))
SMALL_VALUE = _values(st.integers(-3, 300))
"""For readers that build what a file asks for: a number of layers that nobody has memory for is none of these."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a value of JSON."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in inside for place in places(inner, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    if not path:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], by)
    return copy


@st.composite
def other_values(draw: st.DrawFn, content: bytes, value: st.SearchStrategy[Any] = VALUE) -> bytes:
    """A file of JSON with another value at any place."""
    whole = json.loads(content)
    place = draw(st.sampled_from(places(whole)))
    return json.dumps(replaced(whole, place, draw(value))).encode()


@st.composite
def other_headers(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of weights whose header has one other value, of any length, in front of the same bytes or of none."""
    size = int.from_bytes(content[:8], "little")
    text = draw(other_values(content[8 : 8 + size]))
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1) | st.integers(0, 300))
    return length.to_bytes(8, "little") + text + (content[8 + size :] if draw(st.booleans()) else b"")
