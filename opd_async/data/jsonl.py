"""JSON lines on disk that survive a crash: each line is written at once and whole, or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from opd_async.errors import InputError

_BLOCK = 65536


class JsonlWriter:
    """Append objects to a file, one line each, in the kernel's hands when `write` returns. One writer per file.

    A crash of the machine can leave half a line at the end: opening the file again cuts it off.
    """

    def __init__(self, path: Path) -> None:
        """Open or create `path` and its folder; raises `OSError`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._fd, _whole_bytes(self._fd))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object. JSON has no NaN and no infinity: they become null. `OSError` leaves the file whole."""
        try:
            text = json.dumps(row, allow_nan=False)
        except ValueError:
            text = json.dumps(_finite(row), allow_nan=False)
        line = text.encode() + b"\n"
        before = os.fstat(self._fd).st_size
        if os.write(self._fd, line) != len(line):
            os.ftruncate(self._fd, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file; it is safe to call this twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonlRecord:
    """A file of objects that only people read: rows that cannot be written are left out, and `complain` hears it once.

    No run ends for want of room for its records. `rows` replace what the file held, all of them or none.
    """

    def __init__(self, path: Path, complain: Callable[[str], None], rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._path = path
        self._complain = complain
        self._complained = False
        self._writer: JsonlWriter | None = None
        fresh = path.with_name(f"{path.name}.new")
        try:
            fresh.unlink(missing_ok=True)
            with JsonlWriter(fresh) as writer:
                for row in rows:
                    writer.write(row)
            fresh.replace(path)
            self._writer = JsonlWriter(path)
        except OSError as error:
            self._say(error)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object, if there is room for it."""
        if self._writer is None:
            return
        try:
            self._writer.write(row)
        except OSError as error:
            self._say(error)

    def close(self) -> None:
        """Close the file; it is safe to call this twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _say(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            self._complain(f"{self._path} cannot be written: {error.strerror}; rows are missing in it from here on")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, in order, without a half line at its end; `InputError` for a line that is no object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not JSON ({error}); repair or remove the line") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: a JSON object was expected, not {type(row).__name__}")
            yield row


def _whole_bytes(fd: int) -> int:
    """Bytes up to and with the last line end."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - _BLOCK)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
