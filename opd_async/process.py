"""What every role process does at its start: die with its supervisor, log, stop on a signal, end with a clear code.

    python -m opd_async.process COMMAND...   the supervisor starts each role through this: it ties the process to its
                                             parent, raises its limit on open files, then becomes COMMAND (same pid),
                                             whatever COMMAND is written in

The tie is Linux's PR_SET_PDEATHSIG, which survives exec but not fork: a role's own workers call `die_with_parent` too
(`run_role` does). It follows the *thread* that started the process, so start processes from a main thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from io import TextIOBase
from pathlib import Path
from typing import Any, NoReturn

import psutil

from opd_async.errors import OpdError, RoleError, StorageError
from opd_async.files import FULL, unwritten
from opd_async.freed_memory import give_back_regularly
from opd_async.signals import EXIT_INTERRUPTED

PARENT_ENV = "OPD_PARENT_PID"
"""Pid of the supervisor, set in the environment of everything that it starts."""

EXIT_UNEXPECTED = 70
"""Exit code for an error that this program did not foresee (EX_SOFTWARE of sysexits.h)."""

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
GARBAGE_THRESHOLD = 50_000
"""Objects between two looks of the garbage collector. The answer of an engine is thousands of small lists, none in a
cycle; Python's own 700 had it walk through them more than once an answer, which took ten times as long as parsing."""
MOST_OPEN_FILES = 1 << 20
"""What Linux lets a process have unless the administrator has raised `fs.nr_open`."""
_CHATTY = ("aiohttp.access", "asyncio", "filelock", "httpx", "httpx2", "matplotlib", "urllib3")

log = logging.getLogger(__name__)


def _prctl(option: int, value: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when its parent ends; on systems other than Linux do nothing.

    If `OPD_PARENT_PID` is set, that process must still be among this one's ancestors (a worker of torchrun has the
    supervisor as its grandparent), else the parent died before the tie was made: `RoleError`.
    """
    if sys.platform != "linux":
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = os.environ.get(PARENT_ENV)
    if expected is None:
        return
    if int(expected) not in _ancestors():
        raise RoleError(f"supervisor (pid {expected}) is gone: not starting without it; start the run again")


def _ancestors() -> set[int]:
    """Pids of this process's ancestors."""
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):  # one ended while it was looked at: there are others by now
            return {ancestor.pid for ancestor in psutil.Process().parents()}


def stop_event(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets; replaces the handlers that `loop` had for them. Main thread only."""
    event = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


class OneLineFormatter(logging.Formatter):
    """`HH:MM:SS LEVEL message`, the message on one line; only a traceback may follow on lines of its own."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record, without its traceback."""
        return " ".join(super().formatMessage(record).splitlines())


def configure_logging(role_name: str, level: int = logging.INFO, stream: TextIOBase | None = None) -> None:
    """Log records of at least `level` and Python warnings to stderr, or to `stream`, one line each; show `role_name`
    in `ps` and `top`.

    Replaces the handlers of the root logger. Fatal signals (a segfault in a kernel) leave a stack in the log as well.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(OneLineFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    faulthandler.enable(file=sys.__stderr__ if sys.__stderr__ is not None else 2)
    if sys.platform == "linux":
        _prctl(_PR_SET_NAME, role_name.encode()[:15])


def settle_garbage() -> None:
    """Leave what the process has loaded so far out of every later garbage collection, and have fewer of them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_THRESHOLD)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside (nested) exception groups, in the order in which they were raised; else the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def known(error: BaseException) -> BaseException:
    """A `StorageError` in words for the error of a disk that is full or read-only; any other error as it is."""
    if isinstance(error, OSError) and error.errno in FULL:
        return StorageError(unwritten(Path("a file"), error))
    return error


@contextmanager
def raise_cause() -> Iterator[None]:
    """Raise the first of several `OpdError` that arrive as a group, the others as its notes; anything else as it is."""
    try:
        yield
    except BaseExceptionGroup as group:
        causes = list(leaves(group))
        if not all(isinstance(cause, OpdError) for cause in causes):
            raise
        for other in dict.fromkeys(str(cause) for cause in causes[1:]):
            if other != str(causes[0]):
                causes[0].add_note(other)
        raise causes[0] from None


def report_failure(error: BaseException) -> int:
    """Log why the process ends and return its exit code.

    Errors raised on purpose (`OpdError`) get a line each and the code of the first; anything else a traceback and 70.
    """
    causes = [known(cause) for cause in leaves(error)]
    expected = [cause for cause in causes if isinstance(cause, OpdError)]
    if len(expected) == len(causes):
        for message in dict.fromkeys(str(cause) for cause in expected):
            log.error("%s", message)
        return expected[0].exit_code
    if all(isinstance(cause, OpdError | KeyboardInterrupt) for cause in causes):
        log.error("interrupted")
        return EXIT_INTERRUPTED
    log.critical("unexpected error, a defect of this program: please report it with this traceback", exc_info=error)
    return EXIT_UNEXPECTED


def run_role(main: Callable[[], Coroutine[Any, Any, None]]) -> NoReturn:
    """Run a role's `main` on uvloop, tied to the parent, and end the process.

    Raises `SystemExit`: 0, the `exit_code` of an `OpdError` (exception groups are looked into), 130 after an
    interrupt, 70 for anything else.
    """
    import uvloop  # here, so that the start-up guard below stays light

    try:
        die_with_parent()
        settle_garbage()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            give_back_regularly(runner.get_loop())
            runner.run(main())
    except (Exception, KeyboardInterrupt) as error:  # the edge of the process: every error becomes an exit code
        sys.exit(report_failure(error))
    sys.exit(0)


def allow_open_files() -> int:
    """Raise this process's limit on open files as far as it may, and return it.

    Shells give 1024, and every response that is generated holds a connection in an actor and in an engine.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return MOST_OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def _guard(command: list[str]) -> NoReturn:
    try:
        die_with_parent()
        allow_open_files()
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot start {command[0]}: {error.strerror}; is it installed and on the PATH?")
    except OpdError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    _guard(sys.argv[1:])
