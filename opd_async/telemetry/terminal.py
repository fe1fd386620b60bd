"""Say things to a person, on the terminal and in `logs/launcher.log`. Neither can hold a run up or end it.

    say, errors -> logs/launcher.log, with date and time
                -> bounded queue -> thread -> file descriptors of stdout and stderr

what happens                                     what follows
closed pipe, lost terminal, full disk            said once where it can still be read; that place is left alone
a character that the encoding lacks              written as an escape, or as a plain one where it only draws a line
nobody reads (Ctrl-S, a pager)                   lines that the queue cannot hold are left out and counted
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import select
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO, TextIO

from opd_async.errors import StorageError
from opd_async.files import PRIVATE

MAX_WAITING = 2000
"""Lines that wait for a terminal that does not read."""
CLOSE_DEADLINE_S = 10.0
_PLAIN = str.maketrans("━─", "=-")


class _Stream:
    """Writes to stdout or stderr below Python's buffers, in which a line could fail at the very end of the process."""

    def __init__(self, name: str, stream: TextIO | None) -> None:
        self.name = name
        self.gone = stream is None
        self._encoding = (stream.encoding if stream is not None else None) or "utf-8"
        self._stream = stream
        try:
            self._descriptor = stream.fileno() if stream is not None else -1
        except (io.UnsupportedOperation, ValueError):  # somebody has put an object in its place
            self._descriptor = -1

    def write(self, line: str) -> None:
        """Write a line; raises `OSError` if that fails."""
        if self._descriptor < 0:
            assert self._stream is not None
            self._stream.write(f"{line}\n")
            self._stream.flush()
            return
        data = encoded(f"{line}\n", self._encoding)
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # another process has made it so
                select.select([], [self._descriptor], [])


def encoded(text: str, encoding: str) -> bytes:
    """Encode `text` for a terminal. A character that it lacks becomes an escape, a drawn line a plain one."""
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace")


def show(text: str) -> None:
    """Write what a command was asked for to stdout, and nowhere else, as lines.

    A reader that has enough (`| head`), or none at all, is no error. Raises `StorageError` where it cannot be written.
    """
    try:
        stream = _Stream("stdout", sys.stdout)
        if not stream.gone:
            sys.stdout.flush()  # what others have printed comes first
            stream.write(text)
    except BrokenPipeError:
        return
    except OSError as error:
        raise StorageError(f"stdout: {error.strerror}; what was asked for could not be written there") from None


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


class Terminal:
    """Lines for a person; a context manager that delivers what is waiting at its end."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        """Write to `out` and `err` instead of this process's stdout and stderr."""
        self._out = _Stream("stdout", sys.stdout if out is None else out)
        self._err = _Stream("stderr", sys.stderr if err is None else err)
        self._waiting: queue.Queue[tuple[_Stream, str] | None] = queue.Queue(MAX_WAITING)
        self._left_out = 0
        self._said_gone = False
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._early: deque[str] = deque(maxlen=MAX_WAITING)
        self._path = Path()
        self._file_failed = False
        self._writer = threading.Thread(target=self._write, name="terminal", daemon=True)
        self._writer.start()
        self.errors = Errors(self)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, line: str) -> None:
        """Print `line` (or several); never waits and never fails."""
        self._keep(line)
        self._hand_over(self._out, line)

    def complain(self, line: str) -> None:
        """The same on stderr."""
        self._keep(line)
        self._hand_over(self._err, line)

    def keep_in(self, path: Path) -> None:
        """Append every line to the file `path` too, the lines said so far included."""
        with self._lock:
            self._path = path
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                # what roles complain about may quote prompts: the owner's affair, as their own logs are
                self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE), "ab", 0)
                early = "".join(f"{line}\n" for line in (f"=== launch started {_now()}", *self._early))
                self._file.write(encoded(early, "utf-8"))
            except OSError as error:
                trouble: str | None = f"log {path} cannot be written: {error.strerror}; the run goes on without it"
            else:
                trouble = None
            self._early.clear()
        if trouble is not None:
            self._file_failed = True
            self._hand_over(self._err, trouble)

    def close(self) -> None:
        """Deliver the waiting lines, for 10 s at most; then close the log."""
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_DEADLINE_S)
            self._writer.join(CLOSE_DEADLINE_S)
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _keep(self, line: str) -> None:
        line = f"{_now()} {line}"
        with self._lock:
            if self._file is None:
                if not self._file_failed:
                    self._early.append(line)
                return
            try:
                self._file.write(encoded(f"{line}\n", "utf-8"))
                return
            except OSError as error:
                if self._file_failed:
                    return
                self._file_failed = True
                trouble = f"log {self._path} cannot be written: {error.strerror}; the run goes on without it"
        self._hand_over(self._err, trouble)

    def _hand_over(self, stream: _Stream, line: str) -> None:
        try:
            self._waiting.put_nowait((stream, line))
        except queue.Full:
            if self._left_out == 0:
                self._keep("the terminal does not read; lines from here on may stand in this log only")
            self._left_out += 1

    def _write(self) -> None:
        """The thread: wait for a line, write it."""
        while (item := self._waiting.get()) is not None:
            stream, line = item
            if self._left_out:
                left_out, self._left_out = self._left_out, 0
                where = "; they are in the run's logs/launcher.log" if self._file is not None else ""
                self._deliver(stream, f"({left_out} lines were left out here{where})")
            self._deliver(stream, line)

    def _deliver(self, stream: _Stream, line: str) -> None:
        """Write a line. Where that fails, say so once: a process that has lost one stream has most often lost both."""
        if stream.gone:
            return
        try:
            stream.write(line)
        except (OSError, ValueError) as error:  # ValueError: a stream that was closed
            stream.gone = True
            if not self._said_gone:
                self._said_gone = True
                reason = error.strerror if isinstance(error, OSError) else error
                words = f"{stream.name} is gone ({reason}); the run goes on without it"
                self._keep(words)
                self._deliver(self._err, words)


class Errors(io.TextIOBase):
    """Stands in for stderr in `logging`: every record becomes a line of the terminal."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        """Say one record of `logging`, which ends with a line end."""
        if text.rstrip("\n"):
            self._terminal.complain(text.rstrip("\n"))
        return len(text)
