"""The supervisor against real processes: groups, stubborn children, orphans, logs, exits, stops."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import uvloop
from deadlines import patience

from opd_async.cluster.supervisor import Exit, ProcessSpec, Supervisor
from opd_async.errors import RoleError, StateError
from opd_async.telemetry.role_log import TAIL_LINES, LineSplitter, everything, is_loud

PATIENCE_S = 60.0

SLEEPER = "import time\nprint('ready', flush=True)\ntime.sleep(600)"
STUBBORN = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{SLEEPER}"
# A leader with two children that print their pids: one in its group, one in a session of its own, as torchrun does.
FAMILY = """
import subprocess, sys, time
for session in (False, True):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=session)
    print("child", child.pid, flush=True)
print("ready", flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def spec(tmp_path: Path, code: str, name: str = "rollout-0", **env: str) -> ProcessSpec:
    """A role that runs Python code."""
    return ProcessSpec(name, (sys.executable, "-c", code), env, tmp_path / "logs" / f"{name}.log")


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again, for a minute at most."""
    end = time.monotonic() + patience(PATIENCE_S)
    while not condition():
        assert time.monotonic() < end, "condition did not come true within a minute"
        time.sleep(0.02)


async def ready(path: Path) -> list[str]:
    """The lines of a role's log once it has printed `ready`."""
    await asyncio.to_thread(wait_until, lambda: path.exists() and "ready" in path.read_text().splitlines())
    return await asyncio.to_thread(lambda: path.read_text().splitlines())


def supervised(
    body: Callable[[Supervisor, list[str]], Awaitable[None]], deadline_s: float = 30.0, verbose: bool = True
) -> list[str]:
    """Run `body` inside a supervisor; returns what was echoed."""
    echoed: list[str] = []

    async def main() -> None:
        async with asyncio.timeout(patience(PATIENCE_S)):
            policy = everything if verbose else is_loud
            async with Supervisor(echoed.append, deadline_s, policy) as supervisor:
                await body(supervisor, echoed)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
    return echoed


def children(lines: list[str]) -> list[int]:
    """Pids that a family printed."""
    return [int(line.split()[1]) for line in lines if line.startswith("child ")]


def test_stop_ends_the_whole_family(tmp_path: Path) -> None:
    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        family = spec(tmp_path, FAMILY)
        await supervisor.start(family)
        pids = [supervisor.pid("rollout-0"), *children(await ready(family.log_path))]
        assert len(pids) == 3 and all(map(alive, pids))
        end = await supervisor.stop("rollout-0")
        assert not any(map(alive, pids))
        assert end is not None and end.code == -signal.SIGTERM and end.cause == "killed by SIGTERM"
        assert supervisor.running == () and supervisor.exits.empty()
        assert await supervisor.stop("rollout-0") is None

    supervised(body)


def test_stubborn_role_is_killed_at_the_deadline(tmp_path: Path) -> None:
    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        stubborn = spec(tmp_path, STUBBORN)
        await supervisor.start(stubborn)
        await ready(stubborn.log_path)
        end = await supervisor.stop("rollout-0")
        assert end is not None and end.code == -signal.SIGKILL

    supervised(body, deadline_s=0.2)


def test_stubborn_child_of_a_willing_leader_is_killed_at_the_deadline(tmp_path: Path) -> None:
    code = f"""
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], start_new_session=True)
print("child", child.pid, flush=True)
child.wait()
"""

    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        family = spec(tmp_path, code)
        await supervisor.start(family)
        (child,) = children(await ready(family.log_path))
        await supervisor.stop("rollout-0")
        assert not alive(child)

    supervised(body, deadline_s=0.2)


def test_a_crash_is_reported_with_its_last_lines_and_takes_its_children_along(tmp_path: Path) -> None:
    code = FAMILY.replace("time.sleep(600)\n", "[print('line', i) for i in range(100)]; sys.exit(3)\n")
    assert code != FAMILY

    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        crash = spec(tmp_path, code)
        await supervisor.start(crash)
        end = await supervisor.exits.get()
        assert (end.name, end.code, end.cause) == ("rollout-0", 3, "exit code 3")
        assert end.tail == tuple(f"line {i}" for i in range(100 - TAIL_LINES, 100))
        pids = children(crash.log_path.read_text().splitlines())
        assert len(pids) == 2 and not any(map(alive, pids))
        assert supervisor.running == ()

    supervised(body)


def test_kill_is_a_crash_and_a_restart_appends_to_the_log(tmp_path: Path) -> None:
    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        role = spec(tmp_path, SLEEPER)
        await supervisor.start(role)
        await ready(role.log_path)
        with pytest.raises(StateError, match="running already"):
            await supervisor.start(role)
        supervisor.kill("rollout-0")
        assert (await supervisor.exits.get()).cause == "killed by SIGKILL"
        await supervisor.start(spec(tmp_path, "print('second')"))
        assert (await supervisor.exits.get()).code == 0
        lines = role.log_path.read_text().splitlines()
        assert [line[:21] for line in lines if line.startswith("===")] == ["=== rollout-0 started"] * 2
        assert lines[1] == "ready" and lines[-1] == "second"
        with pytest.raises(RoleError, match="rollout-0 is not running"):
            supervisor.kill("rollout-0")

    supervised(body)


def test_a_command_that_does_not_exist_says_so(tmp_path: Path) -> None:
    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        await supervisor.start(ProcessSpec("learner-0", ("no-such-command",), {}, tmp_path / "learner-0.log"))
        end = await supervisor.exits.get()
        assert end.code == 1
        assert end.tail == (
            "cannot start no-such-command: No such file or directory; is it installed and on the PATH?",
        )

    supervised(body)


def test_a_log_that_cannot_be_opened_is_said_once_and_the_role_runs(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")

    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        await supervisor.start(spec(tmp_path, "print('one'); print('two')"))
        end = await supervisor.exits.get()
        assert end.code == 0 and end.tail == ("one", "two")

    (said,) = supervised(body, verbose=False)
    assert said.startswith("rollout-0 | log ") and said.endswith("; it goes on without it")


def test_a_full_disk_under_a_log_is_said_once_and_the_role_runs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()

    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        role = spec(tmp_path, "print('one'); print('two')")
        role.log_path.symlink_to("/dev/full")
        await supervisor.start(role)
        end = await supervisor.exits.get()
        assert end.code == 0 and end.tail == ("one", "two")

    (said,) = supervised(body, verbose=False)
    assert "No space left on device" in said


def test_a_role_prints_any_character_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("LC_ALL", "C")

    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        await supervisor.start(spec(tmp_path, "print('na\\u00efve \\u2501', '\\ud83d')"))
        end = await supervisor.exits.get()
        assert end.code == 0 and end.tail == ("na\u00efve \u2501 \\ud83d",)

    supervised(body)


def test_environment_and_echo_policy(tmp_path: Path) -> None:
    code = """
import os, sys
print("12:00:00 INFO", os.environ["COLOUR"], os.environ["OPD_PARENT_PID"] == str(os.getppid()))
print("12:00:00 WARNING slow", file=sys.stderr)
"""

    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        role = spec(tmp_path, code, COLOUR="blue")
        await supervisor.start(role)
        end = await supervisor.exits.get()
        assert end.tail == ("12:00:00 INFO blue True", "12:00:00 WARNING slow")

    assert supervised(body, verbose=False) == ["rollout-0 | 12:00:00 WARNING slow"]
    assert supervised(body, verbose=True) == [
        "rollout-0 | 12:00:00 INFO blue True",
        "rollout-0 | 12:00:00 WARNING slow",
    ]


def test_stop_all_keeps_the_written_order(tmp_path: Path) -> None:
    code = f"""
import signal, sys, time
from pathlib import Path
def leave(number, frame):
    with Path({str(tmp_path / "order")!r}).open("a") as file:
        file.write(sys.argv[1] + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
{SLEEPER}
"""
    names = ["engine", "teacher", "rollout", "extra"]

    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        for name in names:
            role = spec(tmp_path, code, name)
            await supervisor.start(ProcessSpec(name, (*role.command, name), {}, role.log_path))
        for name in names:
            await ready(tmp_path / "logs" / f"{name}.log")
        await supervisor.stop_all([["rollout"], ["absent", "teacher"], ["engine"]])
        assert supervisor.running == () and supervisor.exits.empty()

    supervised(body)
    assert (tmp_path / "order").read_text().split() == ["rollout", "teacher", "engine", "extra"]


def test_a_second_stop_at_once_ends_the_first(tmp_path: Path) -> None:
    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        for name in ("a", "b"):
            stubborn = spec(tmp_path, STUBBORN, name)
            await supervisor.start(stubborn)
            await ready(stubborn.log_path)
        async with asyncio.TaskGroup() as stops:
            first = stops.create_task(supervisor.stop_all([["a", "b"]]))
            await asyncio.sleep(0)
            assert not first.done()
            await supervisor.stop_all([["a"], ["b"]], at_once=True)
        assert supervisor.running == ()

    supervised(body, deadline_s=1e6)


def test_leaving_the_block_by_an_error_kills_what_runs(tmp_path: Path) -> None:
    pids: list[int] = []

    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        stubborn = spec(tmp_path, STUBBORN)
        await supervisor.start(stubborn)
        pids.append(supervisor.pid("rollout-0"))
        await ready(stubborn.log_path)
        raise RoleError("enough")

    with pytest.raises(RoleError, match="enough"):
        supervised(body, deadline_s=1e6)
    assert pids and not any(map(alive, pids))


def test_unread_exits_hold_nobody_up(tmp_path: Path) -> None:
    async def body(supervisor: Supervisor, echoed: list[str]) -> None:
        while not supervisor.exits.full():
            supervisor.exits.put_nowait(Exit("filler", 0, ()))
        await supervisor.start(spec(tmp_path, "pass"))
        await asyncio.to_thread(wait_until, lambda: not supervisor.running)

    supervised(body)


def test_killing_the_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    worker = "from opd_async.process import die_with_parent; import time; die_with_parent(); time.sleep(600)"
    role = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {worker!r}], start_new_session=True)
print("pid", os.getpid(), flush=True); print("pid", child.pid, flush=True); print("ready", flush=True)
time.sleep(600)
"""
    log = tmp_path / "role.log"
    code = textwrap.dedent(
        f"""
        import asyncio, sys
        from pathlib import Path
        from opd_async.cluster.supervisor import ProcessSpec, Supervisor

        async def main():
            async with Supervisor(print, 30.0) as supervisor:
                await supervisor.start(ProcessSpec("role", (sys.executable, "-c", {role!r}), {{}}, Path({str(log)!r})))
                await asyncio.sleep(600)

        asyncio.run(main())
        """
    )
    with subprocess.Popen([sys.executable, "-c", code]) as supervisor:
        asyncio.run(ready(log))
        pids = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("pid ")]
        assert len(pids) == 2 and all(map(alive, pids))
        # The worker ties itself to the role once it runs: wait for that, else it was never there to be tied.
        wait_until(lambda: "die_with_parent" in " ".join(psutil.Process(pids[1]).cmdline()))
        os.kill(supervisor.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(alive, pids)))


def test_lines_are_split_bounded_and_redrawn() -> None:
    splitter = LineSplitter(max_bytes=10)
    assert splitter.feed(b"one\ntw") == ["one"]
    assert splitter.feed(b"o\r\nthree\xff\n") == ["two", "three�"]
    assert splitter.feed(b"x" * 25) == []
    assert splitter.feed(b"x" * 5 + b"\n") == ["x" * 10 + " [20 bytes cut]"]
    assert splitter.feed(b"10 %\r50 %") == []
    assert splitter.feed(b"\r") == []
    assert splitter.feed(b"100 %\nend") == ["100 %"]
    assert splitter.close() == ["end"] and splitter.close() == []


@pytest.mark.parametrize(
    ("line", "loud"),
    [
        ("12:00:00 WARNING late", True),
        ("[rank0]: 2026-01-01 12:00:00 ERROR gone", True),
        ("12:00:00 INFO all is well", False),
        ("12:00:00 INFO " + "x" * 60 + " ERROR in a message", False),
        ("12:00:00 INFO WARNINGS=0", False),
    ],
)
def test_is_loud(line: str, loud: bool) -> None:
    assert is_loud(line) is loud
