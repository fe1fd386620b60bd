"""Every message survives the wire; everything else is refused with a `WireError`."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from opd_async.errors import WireError
from opd_async.transport import messages as m
from opd_async.transport import wire
from opd_async.transport.wire import ArrayOf, decode, encode

MESSAGES = sorted(wire._BY_NAME)
SCALARS: dict[type, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bool: st.booleans(),
    types.NoneType: st.none(),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type hint."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, ArrayOf)]
    if marks:
        shapes = hnp.array_shapes(min_dims=marks[0].ndim, max_dims=marks[0].ndim, min_side=0, max_side=5)
        return shapes.flatmap(lambda shape: hnp.arrays(marks[0].dtype, shape))
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(part) for part in parts])
    if origin is dict:
        return st.dictionaries(st.text(max_size=5), SCALARS[parts[1]], max_size=3)
    if origin is list:
        return st.lists(SCALARS[parts[0]], max_size=3)
    return SCALARS[hint]


def messages_of(cls: type) -> st.SearchStrategy[Any]:
    """Any message of a class."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{field.name: values_of(hints[field.name]) for field in dataclasses.fields(cls)})


def assert_equal(left: Any, right: Any) -> None:
    """Field by field; arrays by dtype, shape and bytes, since NaN is unlike itself."""
    assert type(left) is type(right)
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, np.ndarray):
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), field.name
        else:
            assert a == b, field.name


def over_the_wire(frames: list[wire.Frame]) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def a_chunk(**changes: Any) -> m.Chunk:
    ids, logprobs = np.arange(4, dtype=np.int32), -np.arange(4, dtype=np.float32)
    chunk = m.Chunk(
        sample_id=7,
        attempt=0,
        actor=1,
        prompt_id=3,
        prompt_tokens=2,
        start=0,
        weight_version=5,
        finish=None,
        label="x",
        made_at=1.5,
        token_ids=ids,
        behaviour_logprobs=logprobs,
        context=np.arange(2, dtype=np.int32),
    )
    return dataclasses.replace(chunk, **changes)


def header_of(frames: list[wire.Frame]) -> list[Any]:
    parts: list[Any] = msgpack.unpackb(frames[0])
    return parts


def with_header(frames: list[wire.Frame], position: int, value: Any) -> list[wire.Frame]:
    parts = header_of(frames)
    parts[position] = value
    return [msgpack.packb(parts), *frames[1:]]


def with_field(field: str, value: Any) -> list[wire.Frame]:
    frames = encode(a_chunk())
    return with_header(frames, 2, header_of(frames)[2] | {field: value})


@pytest.mark.parametrize("name", MESSAGES)
def test_round_trip(name: str) -> None:
    @settings(max_examples=25, deadline=None)
    @given(messages_of(wire._BY_NAME[name].cls))
    def check(message: Any) -> None:
        assert_equal(message, decode(over_the_wire(encode(message))))

    check()


def test_every_message_of_the_module_is_registered() -> None:
    declared = {name for name, value in vars(m).items() if dataclasses.is_dataclass(value)}
    assert declared == set(MESSAGES)


def test_arrays_are_not_copied() -> None:
    chunk = a_chunk()
    frames = encode(chunk)
    assert np.shares_memory(np.frombuffer(frames[1], np.uint8), chunk.token_ids)
    received = over_the_wire(frames)
    back = decode(received)
    assert np.shares_memory(back.token_ids, np.frombuffer(received[1], np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        back.token_ids[0] = 1


def test_arrays_take_the_declared_dtype_and_order() -> None:
    odd = np.arange(8, dtype=">i8")[::2]
    back = decode(encode(a_chunk(token_ids=odd)))
    assert back.token_ids.dtype == np.dtype("<i4")
    assert back.token_ids.tolist() == [0, 2, 4, 6]


def test_optional_arrays_may_be_absent_and_others_not() -> None:
    assert decode(encode(a_chunk(context=None))).context is None
    frames = encode(a_chunk())
    layout = [entry for entry in header_of(frames)[3] if entry[0] != "token_ids"]
    with pytest.raises(WireError, match="token_ids is missing"):
        decode([with_header(frames, 3, layout)[0], *frames[2:]])


def test_encode_refuses_what_is_no_message_or_has_another_rank() -> None:
    with pytest.raises(WireError, match="int is not a wire message"):
        encode(3)
    with pytest.raises(WireError, match="2 dimensions"):
        encode(a_chunk(token_ids=np.zeros((2, 2), np.int32)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_id", "7"),
        ("sample_id", 7.0),
        ("sample_id", True),
        ("sample_id", None),
        ("finish", 3),
        ("label", b"x"),
        ("made_at", "now"),
        ("unknown", 1),
        (1, 1),
        (None, None),
    ],
)
def test_plain_fields_are_checked(field: Any, value: Any) -> None:
    with pytest.raises(WireError):
        decode(with_field(field, value))


@pytest.mark.parametrize("counters", [{"a": "b"}, {"a": None}, {1: 1.0}, {"a": [1]}, [], "x", {"a": True}])
def test_dictionaries_are_checked_inside(counters: Any) -> None:
    frames = encode(m.Heartbeat("learner-0", {"idle_s": 1}))
    with pytest.raises(WireError, match="counters"):
        decode(with_header(frames, 2, {"role": "learner-0", "counters": counters}))


@pytest.mark.parametrize("engines", [[1], ["a", None], "http://a", {"a": "b"}])
def test_lists_are_checked_inside(engines: Any) -> None:
    hints = typing.get_type_hints(m.SyncWeights)
    plain = m.SyncWeights(**{name: (typing.get_origin(hint) or hint)() for name, hint in hints.items()})
    frames = encode(plain)
    with pytest.raises(WireError, match="engines"):
        decode(with_header(frames, 2, header_of(frames)[2] | {"engines": engines}))


@pytest.mark.parametrize(
    "entry",
    [
        ["token_ids", "<i8", [2]],
        ["token_ids", "|O", [2]],
        ["token_ids", "<i4", [5]],
        ["token_ids", "<i4", [2, 2]],
        ["token_ids", "<i4", [-4]],
        ["token_ids", "<i4", [4.0]],
        ["token_ids", "<i4", 4],
        ["token_ids", "<i4"],
        ["label", "<i4", [4]],
        [["token_ids"], "<i4", [4]],
        [{}, "<i4", [4]],
        "token_ids",
        ["behaviour_logprobs", "<f4", [4]],
    ],
)
def test_array_layouts_are_checked(entry: Any) -> None:
    frames = encode(a_chunk())
    layout = header_of(frames)[3]
    with pytest.raises(WireError):
        decode(with_header(frames, 3, [entry, *layout[1:]]))


@pytest.mark.parametrize("shape", [[0, 2**62], [0, 2**64 - 1], [2**62, 0]])
def test_impossible_shapes_are_refused(shape: list[int]) -> None:
    nothing = np.zeros(0, np.int32)
    frames = encode(m.Frontier(0, np.zeros((0, 2), np.int64), nothing, nothing, nothing))
    layout = header_of(frames)[3]
    with pytest.raises(WireError, match="shape"):
        decode(with_header(frames, 3, [["completed", "<i8", shape], *layout[1:]]))


def test_headers_of_other_programs_are_refused() -> None:
    frames = encode(a_chunk())
    for position, value, text in ((0, 2, "version 2"), (1, "Chank", "unknown"), (2, 3, "not"), (3, {}, "not")):
        with pytest.raises(WireError, match=text):
            decode(with_header(frames, position, value))
    with pytest.raises(WireError, match="no header"):
        decode([])
    with pytest.raises(WireError, match="bytes"):
        decode([bytes(wire.MAX_HEADER_BYTES + 1)])
    with pytest.raises(WireError, match="frames"):
        decode([*frames, b""])


def decodes_or_refuses(frames: list[bytes]) -> None:
    """The one allowed exception is `WireError`; what does decode can be encoded again."""
    try:
        message = decode(frames)
    except WireError:
        return
    encode(message)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=4))
def test_random_frames(frames: list[bytes]) -> None:
    decodes_or_refuses(frames)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(MESSAGES), ANYTHING, ANYTHING, st.lists(st.binary(max_size=16), max_size=3))
def test_random_headers(name: str, fields: Any, layout: Any, frames: list[bytes]) -> None:
    decodes_or_refuses([msgpack.packb([wire.SCHEMA_VERSION, name, fields, layout]), *frames])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_messages(data: st.DataObject) -> None:
    frames = over_the_wire(encode(a_chunk()))
    at = data.draw(st.integers(0, len(frames) - 1))
    damaged = bytearray(frames[at])
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    frames[at] = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    decodes_or_refuses(frames)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["sample_id", "finish", "label", "made_at", "extra"]), ANYTHING)
def test_random_fields(field: str, value: Any) -> None:
    decodes_or_refuses(over_the_wire(with_field(field, value)))
