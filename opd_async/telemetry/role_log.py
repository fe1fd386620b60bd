"""Keep the log of one role: write down what its processes print, and hold the last lines for messages.

pipe -> LineSplitter -> logs/<role>.log
                     -> tail (last 30 lines)
                     -> echo, for the lines that the echo policy picks
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from opd_async.files import PRIVATE

TAIL_LINES = 30
MAX_LINE_BYTES = 8192
_READ_BYTES = 65536
_LOUD = re.compile(r"^.{0,60}?\b(WARNING|ERROR|CRITICAL|FATAL)\b")


def is_loud(line: str) -> bool:
    """Tell whether a log line is at WARNING or above: its level stands within the first 60 characters."""
    return _LOUD.match(line) is not None


def everything(line: str) -> bool:
    """Echo every line: the policy of a verbose run."""
    return True


class LineSplitter:
    """Cuts bytes into lines. Memory is bounded: a line keeps its first 8192 bytes and says how many were cut.

    Of a line that was redrawn with carriage returns (a progress bar) only the last state is kept, as on a terminal.
    """

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max = max_bytes
        self._open = b""
        self._cut = 0

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that `data` completes, without line ends; bytes that are not UTF-8 are replaced."""
        *whole, rest = data.split(b"\n")
        lines = []
        for piece in whole:
            self._append(piece)
            lines.append(self._take())
        self._append(rest)
        return lines

    def close(self) -> list[str]:
        """Return the last line, if it had no line end."""
        return [self._take()] if self._open or self._cut else []

    def _append(self, piece: bytes) -> None:
        _, carriage, latest = piece.rstrip(b"\r").rpartition(b"\r")
        if carriage or (self._open.endswith(b"\r") and piece):
            self._open, self._cut = b"", 0
        text = latest + (b"\r" if piece.endswith(b"\r") else b"")
        room = self._max - len(self._open)
        self._open += text[:room]
        self._cut += max(0, len(text) - room)

    def _take(self) -> str:
        line = self._open.rstrip(b"\r").decode("utf-8", "replace")
        if self._cut:
            line += f" [{self._cut} bytes cut]"
        self._open, self._cut = b"", 0
        return line


class RoleLog:
    """Appends what one start of a role prints to its log file, under a header line. Use `follow` once, then `close`."""

    def __init__(
        self,
        name: str,
        path: Path,
        header: str,
        echo: Callable[[str], None],
        echo_line: Callable[[str], bool],
        secrets: Sequence[str] = (),
        on_unwritten: Callable[[int], None] = lambda lines: None,
    ) -> None:
        """Open `path` for appending. If that fails, `echo` is told, and the role goes on without a log.

        A secret is written as `***` wherever it is printed. `on_unwritten` is told how many lines found no room.
        """
        self._name = name
        self._path = path
        self._echo = echo
        self._echo_line = echo_line
        self._on_unwritten = on_unwritten
        self._secrets = re.compile("|".join(map(re.escape, secrets))) if secrets else None
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._broken = False
        self._file: BinaryIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # prompts and tracebacks are the owner's affair, also on a shared machine
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE), "ab", 0)
            os.fchmod(self._file.fileno(), PRIVATE)
        except OSError as error:
            self._complain(error)
        self._append(f"=== {self._masked(header)}\n")

    @property
    def tail(self) -> tuple[str, ...]:
        """Return the last 30 lines of this start, oldest first."""
        return tuple(self._tail)

    async def follow(self, read_fd: int) -> None:
        """Write everything that comes out of the pipe to the log until all its writers are gone; closes `read_fd`.

        The pipe is emptied even if the file cannot be written, so that no role blocks on printing. On cancel: the
        lines read so far are written, and the pipe is closed.
        """
        reader = asyncio.StreamReader(limit=_READ_BYTES)
        pipe = os.fdopen(read_fd, "rb", buffering=0)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        splitter = LineSplitter()
        try:
            while data := await reader.read(_READ_BYTES):
                self._file_lines(splitter.feed(data))
        finally:
            self._file_lines(splitter.close())
            transport.close()

    def _masked(self, line: str) -> str:
        return line if self._secrets is None else self._secrets.sub("***", line)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _append(self, text: str) -> None:
        data = text.encode()
        try:
            if self._file is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._on_unwritten(text.count("\n"))
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        """Say once that the log cannot be written. The role goes on: a log is for people only."""
        if not self._broken:
            self._echo(f"{self._name} | log {self._path} cannot be written: {error.strerror}; it goes on without it")
        self._broken = True

    def _file_lines(self, lines: list[str]) -> None:
        if not lines:
            return
        lines = [self._masked(line) for line in lines]
        self._tail.extend(lines)
        self._append("".join(f"{line}\n" for line in lines))
        for line in lines:
            if self._echo_line(line):
                self._echo(f"{self._name} | {line}")
