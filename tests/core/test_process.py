"""The start of a role process: exit codes, messages, signals, the tie to the parent."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator

import psutil
import pytest
from deadlines import patience

from opd_async.errors import DeadlineError, InputError, OpdError, RoleError
from opd_async.process import (
    EXIT_INTERRUPTED,
    EXIT_UNEXPECTED,
    MOST_OPEN_FILES,
    OneLineFormatter,
    configure_logging,
    die_with_parent,
    leaves,
    report_failure,
    stop_event,
)


@pytest.fixture
def root_logging() -> Iterator[None]:
    """Put the root logger and the warnings module back as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def run_main(body: str, *, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A process whose role main is `body`."""
    code = f"""
import asyncio
from opd_async.errors import *
from opd_async.process import configure_logging, run_role, stop_event

async def fail(error):
    raise error

async def main():
    configure_logging("rollout-0")
    {body}

run_role(main)
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=patience(60),
        env={**os.environ, **(env or {})},
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("pass", 0, ""),
        ("raise InputError('topology.yaml: no\\nsuch key')", 2, "ERROR topology.yaml: no such key"),
        ("raise RoleError('gone')", 1, "ERROR gone"),
    ],
)
def test_exit_codes_with_one_line(body: str, code: int, message: str) -> None:
    done = run_main(body)
    assert done.returncode == code
    assert done.stderr.strip().endswith(message) and done.stderr.count("\n") == (1 if message else 0)


def test_an_exception_group_is_looked_into() -> None:
    done = run_main("async with asyncio.TaskGroup() as tasks: tasks.create_task(fail(InputError('inside')))")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("ERROR inside") and done.stderr.count("\n") == 1


def test_an_unexpected_error_shows_its_traceback() -> None:
    done = run_main("async with asyncio.TaskGroup() as tasks: tasks.create_task(fail(ZeroDivisionError('oops')))")
    assert done.returncode == EXIT_UNEXPECTED
    assert "CRITICAL unexpected error" in done.stderr and "ZeroDivisionError: oops" in done.stderr


def test_ctrl_c_without_a_handler_is_an_interrupt() -> None:
    # a shell that starts the tests in the background has its children ignore Ctrl-C
    code = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    done = run_main(code + "os.kill(os.getpid(), signal.SIGINT); await asyncio.sleep(60)")
    assert done.returncode == EXIT_INTERRUPTED
    assert "Traceback" not in done.stderr


def test_a_parent_that_is_gone_is_refused() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait(60)
    done = run_main("print('ran')", env={"OPD_PARENT_PID": str(gone.pid)})
    assert done.returncode == RoleError.exit_code
    assert f"supervisor (pid {gone.pid}) is gone" in done.stderr and done.stdout == ""


def test_a_grandparent_counts_as_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_PARENT_PID", str(os.getpid()))
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TIED!r}], check=True)"
    done = subprocess.run(
        [sys.executable, "-c", inner], capture_output=True, text=True, timeout=patience(60), check=True
    )
    assert done.stdout == "tied\n"


TIED = "from opd_async.process import die_with_parent; die_with_parent(); print('tied', flush=True)"


def test_an_ancestor_that_ends_while_it_is_looked_at_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPD_PARENT_PID", str(os.getpid()))
    ending = (
        "import psutil\n"
        "find, ended = psutil.Process.parents, [1, 2]\n"
        "def parents(process):\n"
        "    if ended:\n"
        "        raise psutil.NoSuchProcess(ended.pop())\n"
        "    return find(process)\n"
        "psutil.Process.parents = parents\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", ending + TIED], capture_output=True, text=True, timeout=patience(60), check=True
    )
    assert done.stdout == "tied\n"


def test_elsewhere_than_on_linux_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("OPD_PARENT_PID", "not read")
    die_with_parent()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_stop_event(number: signal.Signals) -> None:
    event = stop_event(asyncio.get_running_loop())
    assert not event.is_set()
    os.kill(os.getpid(), number)
    await asyncio.wait_for(event.wait(), patience(60))


def test_leaves_keep_their_order() -> None:
    group = ExceptionGroup("a", [ValueError("1"), ExceptionGroup("b", [ValueError("2")]), ValueError("3")])
    assert [str(error) for error in leaves(group)] == ["1", "2", "3"]
    assert [str(error) for error in leaves(ValueError("alone"))] == ["alone"]


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([DeadlineError("x"), InputError("y")], OpdError.exit_code),
        ([InputError("x"), DeadlineError("y")], InputError.exit_code),
        ([RoleError("x"), KeyboardInterrupt()], EXIT_INTERRUPTED),
        ([RoleError("x"), ValueError("y")], EXIT_UNEXPECTED),
    ],
)
def test_the_code_of_several_errors(errors: list[BaseException], code: int) -> None:
    assert report_failure(BaseExceptionGroup("several", errors)) == code


def test_one_message_that_many_tasks_raise_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    report_failure(ExceptionGroup("several", [RoleError("gone"), RoleError("gone"), RoleError("late")]))
    assert caplog.messages == ["gone", "late"]


def test_records_are_one_line() -> None:
    record = logging.LogRecord("x", logging.WARNING, "file", 1, "two\nlines %d", (2,), None)
    assert OneLineFormatter().format(record)[8:] == " WARNING two lines 2"


def test_configure_logging(root_logging: None, capsys: pytest.CaptureFixture[str]) -> None:
    name = psutil.Process().name()
    try:
        configure_logging("student-engine-12")
        logging.getLogger("some.role").info("hello")
        logging.getLogger("aiohttp.access").info("GET /")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("careful", stacklevel=1)
    finally:
        configure_logging(name)
    lines = capsys.readouterr().err.splitlines()
    assert [line[8:] for line in lines[:1]] == [" INFO hello"]
    assert len(lines) == 2 and " WARNING " in lines[1] and "careful" in lines[1]


def test_a_role_may_open_as_many_files_as_the_system_lets_it() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    ended = subprocess.run(
        [sys.executable, "-m", "opd_async.process", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=patience(30.0),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
    )
    most = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    assert [int(word) for word in ended.stdout.split()] == [most, hard]
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
