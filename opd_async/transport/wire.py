"""Messages to ZeroMQ frames and back, without pickle and without copying arrays.

    frame 0      MessagePack [schema version, type name, {field: value}, [[field, dtype, shape], ...]]
    frame 1 ...  one raw little-endian array per entry of that last list, in order

Every message is a frozen dataclass registered with `@message`. Fields of the array types below travel as frames, all
others in the header. `decode` checks version, type, field names, scalar types, dtypes, ranks and byte counts, and
raises `WireError` for anything else; receivers count and drop such frames.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgpack
import numpy as np
from numpy.typing import NDArray

from opd_async.errors import WireError

SCHEMA_VERSION = 1
MAX_HEADER_BYTES = 16 * 1024 * 1024
T = TypeVar("T")

Frame = bytes | memoryview


class _Accepted(typing.NamedTuple):
    """Runtime types of a header value, and of its elements where it is a list or a dictionary."""

    types: tuple[type, ...]
    elements: tuple[type, ...] = ()

    def admits(self, value: Any) -> bool:
        """Whether `value` has one of the types, exactly: a bool is no number. MessagePack makes no subclasses."""
        kind = type(value)
        if kind is dict:
            value, keys = value.values(), value
            if any(type(key) is not str for key in keys):
                return False
        if kind is dict or kind is list:
            return kind in self.types and all(type(item) in self.elements for item in value)
        return kind in self.types


@dataclasses.dataclass(frozen=True, slots=True)
class _Schema:
    """What a registered message looks like on the wire."""

    cls: type
    plain: dict[str, _Accepted]
    arrays: dict[str, tuple[np.dtype[Any], int, bool]]
    """Array fields: dtype, number of dimensions, whether None is allowed."""


_BY_NAME: dict[str, _Schema] = {}
_BY_TYPE: dict[type, _Schema] = {}


class ArrayOf(typing.NamedTuple):
    """Marks an array field: `Annotated[NDArray[np.int32], ArrayOf("<i4")]` travels raw, little-endian."""

    dtype: str
    ndim: int = 1


Int32 = Annotated[NDArray[np.int32], ArrayOf("<i4")]
Int64 = Annotated[NDArray[np.int64], ArrayOf("<i8")]
Float64 = Annotated[NDArray[np.float64], ArrayOf("<f8")]
Float32 = Annotated[NDArray[np.float32], ArrayOf("<f4")]
Int32Matrix = Annotated[NDArray[np.int32], ArrayOf("<i4", 2)]
Float32Matrix = Annotated[NDArray[np.float32], ArrayOf("<f4", 2)]
Intervals = Annotated[NDArray[np.int64], ArrayOf("<i8", 2)]


def message(cls: type[T]) -> type[T]:
    """Register a frozen dataclass as a wire message under its class name."""
    arrays: dict[str, tuple[np.dtype[Any], int, bool]] = {}
    plain: dict[str, _Accepted] = {}
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        marks = [mark for part in parts for mark in getattr(part, "__metadata__", ()) if isinstance(mark, ArrayOf)]
        if marks:
            arrays[field.name] = (np.dtype(marks[0].dtype), marks[0].ndim, type(None) in parts)
        else:
            plain[field.name] = _accepted(hint)
    schema = _Schema(cls, plain, arrays)
    _BY_NAME[cls.__name__] = schema
    _BY_TYPE[cls] = schema
    return cls


def _accepted(hint: Any) -> _Accepted:
    """What a header value may be for a type hint: a scalar, an optional scalar, `list[X]` or `dict[str, X]`."""
    origin = typing.get_origin(hint)
    if origin in (list, dict):
        return _Accepted((origin,), _scalar_types(typing.get_args(hint)[-1]))
    parts = typing.get_args(hint) if origin in (types.UnionType, typing.Union) else (hint,)
    return _Accepted(tuple(kind for part in parts for kind in _scalar_types(part)))


def _scalar_types(hint: type) -> tuple[type, ...]:
    """Integers are welcome where floats are meant."""
    return (float, int) if hint is float else (hint,)


def encode(value: Any) -> list[Frame]:
    """Frames of one message. Arrays are not copied when they are C-contiguous and of the declared dtype.

    Raises `WireError` when the type is not registered or an array has another rank than declared.
    """
    schema = _BY_TYPE.get(type(value))
    if schema is None:
        raise WireError(f"{type(value).__name__} is not a wire message; register it with @message")
    header = {name: getattr(value, name) for name in schema.plain}
    layout: list[tuple[str, str, tuple[int, ...]]] = []
    frames: list[Frame] = [b""]
    for name, (dtype, ndim, optional) in schema.arrays.items():
        array = getattr(value, name)
        if array is None and optional:
            continue
        array = np.ascontiguousarray(array, dtype=dtype)
        if array.ndim != ndim:
            raise WireError(f"{type(value).__name__}.{name} has {array.ndim} dimensions, the schema says {ndim}")
        layout.append((name, dtype.str, array.shape))
        frames.append(array.data.cast("B") if array.size else b"")
    frames[0] = msgpack.packb((SCHEMA_VERSION, type(value).__name__, header, layout), use_bin_type=True)
    return frames


def decode(frames: Sequence[Frame]) -> Any:
    """The message that `frames` hold; its arrays are read-only views of the frames.

    Raises `WireError`, which says what was wrong, for everything that is not a well-formed message.
    """
    name, header, layout = _header(frames)
    schema = _BY_NAME.get(name)
    if schema is None:
        raise WireError(f"unknown message type {name!r}")
    if set(header) != set(schema.plain):
        raise WireError(f"{name}: header fields {list(header)} are not {list(schema.plain)}")
    for field, accepted in schema.plain.items():
        if not accepted.admits(header[field]):
            raise WireError(f"{name}.{field}: {header[field]!r:.80} where {accepted.types[0].__name__} belongs")
    if len(layout) != len(frames) - 1:
        raise WireError(f"{name}: {len(frames) - 1} array frames where the header lists {len(layout)}")
    values = dict(header)
    for entry, frame in zip(layout, frames[1:], strict=True):
        field, array = _array(schema, name, entry, frame)
        if field in values:
            raise WireError(f"{name}.{field}: comes twice")
        values[field] = array
    missing = [f for f, (_, _, optional) in schema.arrays.items() if f not in values and not optional]
    if missing:
        raise WireError(f"{name}: array {missing[0]} is missing")
    return schema.cls(**values)


def _header(frames: Sequence[Frame]) -> tuple[str, dict[str, Any], list[Any]]:
    """Type name, plain fields and array layout of frame 0."""
    if not frames or len(frames[0]) > MAX_HEADER_BYTES:
        raise WireError("no header frame" if not frames else f"a header of {len(frames[0])} bytes")
    try:
        parts = msgpack.unpackb(frames[0], raw=False, strict_map_key=False)
    except Exception as error:  # msgpack raises a dozen unrelated types on garbage
        raise WireError(f"the header is not MessagePack: {error}") from None
    if not isinstance(parts, list) or len(parts) != 4:
        raise WireError("the header is not [version, type, fields, arrays]")
    version, name, header, layout = parts
    if version != SCHEMA_VERSION:
        raise WireError(f"schema version {version!r}, this program speaks {SCHEMA_VERSION}")
    if not isinstance(name, str) or not isinstance(header, dict) or not isinstance(layout, list):
        raise WireError("the header is not [version, type, fields, arrays]")
    return name, header, layout


def _array(schema: _Schema, name: str, entry: Any, frame: Frame) -> tuple[str, np.ndarray[Any, Any]]:
    """One array frame, checked against the schema and the header's own shape."""
    if not isinstance(entry, list) or len(entry) != 3 or entry[0] not in list(schema.arrays):
        raise WireError(f"{name}: {entry!r} is not an array of this message")
    field, dtype_name, shape = entry
    dtype, ndim, _ = schema.arrays[field]
    if dtype_name != dtype.str:
        raise WireError(f"{name}.{field}: dtype {dtype_name!r} where {dtype.str!r} belongs")
    if not isinstance(shape, list) or len(shape) != ndim or not all(type(n) is int and n >= 0 for n in shape):
        raise WireError(f"{name}.{field}: shape {shape!r} is not {ndim}-dimensional")
    expected = dtype.itemsize
    for n in shape:
        expected *= n
    if len(frame) != expected:
        raise WireError(f"{name}.{field}: {len(frame)} bytes where {expected} belong")
    try:
        array = np.frombuffer(frame, dtype=dtype).reshape(shape)
    except ValueError:  # one dimension is 0 and another beyond any array
        raise WireError(f"{name}.{field}: no array has the shape {shape}") from None
    array.flags.writeable = False
    return field, array
