"""JSON lines on disk that survive a crash: each line is written at once and whole, or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
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

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._fd).st_size

    def cut(self, size: int) -> None:
        """Let go of what is behind the first `size` bytes; a shorter file stays as it is. Raises `OSError`."""
        if size < self.size:
            os.ftruncate(self._fd, size)

    def sync(self) -> None:
        """Have everything reach the disk; raises `OSError`."""
        os.fsync(self._fd)

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
    """A file of objects that only people read: rows that cannot be written are left out and counted.

    No run ends for want of room for its records. `complain` hears of the first row that is left out.
    """

    def __init__(self, path: Path, complain: Callable[[str], None], keep: int | None = None) -> None:
        """Open or create `path` and go on behind its first `keep` bytes, or behind all its whole lines.

        The file is cut in place and in one call: at no moment is what stays in it only somewhere else.
        """
        self._path = path
        self._complain = complain
        self.lost = 0
        """Rows that were left out."""
        self._complained = False
        self._writer: JsonlWriter | None = None
        try:
            self._writer = JsonlWriter(path)
            if keep is not None:
                self._writer.cut(keep)
        except OSError as error:
            self._say(error)

    @property
    def size(self) -> int:
        """Bytes of the rows so far: what to `keep` in order to go back to this moment. 0 for one that is not open."""
        return 0 if self._writer is None else self._writer.size

    def write(self, row: Mapping[str, Any]) -> bool:
        """Append one object, if there is room for it; returns whether there was."""
        try:
            if self._writer is not None:
                self._writer.write(row)
                return True
        except OSError as error:
            self._say(error)
        self.lost += 1
        return False

    def sync(self) -> None:
        """Have the rows so far reach the disk, as far as it takes them."""
        if self._writer is not None:
            try:
                self._writer.sync()
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


def read_jsonl(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """The objects of a file, in order, without a half line at its end; `InputError` for a line that is no object.

    `start` is the byte to begin at, where a line begins.
    """
    return (row for _, row in read_jsonl_ends(path, start))


def read_jsonl_ends(path: Path, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `read_jsonl`, each object behind the byte at which its line ends."""
    with path.open("rb") as file:
        file.seek(start)
        end = start
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            where = f"{path}:{number}" if start == 0 else f"{path}: line {number} from byte {start} on"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{where}: not JSON ({error}); repair or remove the line") from error
            if not isinstance(row, dict):
                raise InputError(f"{where}: a JSON object was expected, not {type(row).__name__}")
            yield end, row


def begins_line(path: Path, at: int) -> bool:
    """Whether a line of the file begins at byte `at`, or none can: the file is shorter, or not there."""
    if at == 0 or not path.exists() or path.stat().st_size < at:
        return True
    with path.open("rb") as file:
        file.seek(at - 1)
        return file.read(1) == b"\n"


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
