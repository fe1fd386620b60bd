"""Start, watch and stop the processes of a run. Every role is a session of its own; nothing outlives the supervisor.

    start -> guard (opd_async.process) -> exec -> role -> pipe -> logs/<role>.log, echo
                                           |
                                           +- ends -> what is left of its group is killed -> exits

    loop          waits for                          unblocked by
    watch (each)  the role's end, then its group's   exit, signal; SIGKILL at the deadline
                  room in `exits`                    the dispatcher taking an exit
    log (each)    output                             a line; the end of the last writer

Roles do not look for modules in the working directory: a folder of the user's that is called `learner` or `torch`
stays out of them. Hooks are looked for there, last (`opd_async.hooks`).

Stopping is SIGTERM to every process of the role, SIGKILL at the deadline. If the supervisor itself is killed, the
kernel kills the roles (`opd_async.process.die_with_parent`).
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from opd_async.cluster.process_group import MARK_ENV, ProcessGroup
from opd_async.cluster.scratch import Scratch
from opd_async.errors import DeadlineError, RoleError, StateError
from opd_async.hooks import away_from_here
from opd_async.process import PARENT_ENV
from opd_async.telemetry.role_log import RoleLog, is_loud

MAX_UNREAD_EXITS = 64
KILL_DEADLINE_S = 30.0
"""A process that is still there so long after SIGKILL hangs inside the kernel (a lost disk, a lost GPU)."""
LOG_DEADLINE_S = 2.0
"""How long to read on after a role's last process ended, when a stranger holds its output open."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to start: `env` is added to the supervisor's environment, `log_path` is appended to.

    `secrets` are keys that the log must not show, whatever the role prints.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    log_path: Path
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a role: `code` is its exit code, or minus the number of the signal that ended it."""

    name: str
    code: int
    tail: tuple[str, ...]
    """Its last log lines, at most 30."""

    @property
    def cause(self) -> str:
        """`exit code 1`, `killed by SIGKILL`."""
        return f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


@dataclass(slots=True, kw_only=True)
class _Role:
    spec: ProcessSpec
    log: RoleLog
    group: ProcessGroup = field(default_factory=ProcessGroup)
    pid: int = 0
    asked: bool = False
    kill_at: float = 0.0
    """When SIGKILL is due, on `time.monotonic`'s scale; set when the role is asked to stop, or ends by itself."""
    end: Exit | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def hurry(self) -> None:
        """Kill it, because that was asked for."""
        self.asked = True
        self.kill_at = time.monotonic()
        self.group.signal(signal.SIGKILL)


class Supervising(Protocol):
    """What a run needs of whoever starts its processes: on this host (`Supervisor`), or on several (`hosts.py`)."""

    exits: asyncio.Queue[Exit]
    """Ends that nobody asked for, in order."""

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the processes that are there."""

    def lost(self, name: str) -> bool:
        """Whether the host of this process cannot be reached now."""

    async def start(self, spec: ProcessSpec) -> None:
        """Start a process; `RoleError` if that cannot be done."""

    async def stop(self, name: str) -> Exit | None:
        """Stop a process in order, and wait for its end."""

    async def stop_all(self, order: Sequence[Sequence[str]], at_once: bool = False) -> None:
        """Stop every process, one group of `order` after the other, or all at once."""

    def kill(self, name: str) -> None:
        """Kill a process as a crash would."""


async def together(stop: Callable[[str], Awaitable[Exit | None]], names: Sequence[str]) -> None:
    """Stop all of these at the same time: thousands of engines take as long as the slowest one.

    Raises an exception group of what `stop` raises. On cancel: as `stop`.
    """

    async def one(name: str) -> None:
        await stop(name)

    async with asyncio.TaskGroup() as stops:
        for name in names:
            stops.create_task(one(name), name=f"stop {name}")


class Supervisor:
    """The processes of a run, by role name.

    `async with Supervisor(...) as supervisor:`; leaving the block, by its end, an error or a cancellation, kills what
    still runs at once and waits for it. Stop in order with `stop_all` before leaving.
    """

    def __init__(
        self,
        echo: Callable[[str], None],
        stop_deadline_s: float,
        echo_line: Callable[[str], bool] = is_loud,
        on_unwritten: Callable[[int], None] = lambda lines: None,
    ) -> None:
        """`echo` gets `<role> | <line>` for the log lines that `echo_line` picks; it must not block. `on_unwritten` is
        told how many lines a log had no room for."""
        self.exits: asyncio.Queue[Exit] = asyncio.Queue(MAX_UNREAD_EXITS)
        """Ends that nobody asked for with `stop` or `stop_all`, in order."""
        self._echo = echo
        self._echo_line = echo_line
        self._on_unwritten = on_unwritten
        self._stop_deadline_s = stop_deadline_s
        self._roles: dict[str, _Role] = {}
        self._tasks = asyncio.TaskGroup()
        self._watches: set[asyncio.Task[None]] = set()
        self._scratch = Scratch()
        self._temporary: Path | None = None
        """Where the roles' temporary files go."""

    async def __aenter__(self) -> Self:
        self._temporary = self._scratch.__enter__()
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.stop_all((), at_once=True)
        finally:
            for watch in self._watches:  # those left wait for room in `exits`, which nobody reads any more
                watch.cancel()
            # The block's own error goes on as it is, not in an exception group.
            cancelled = error if isinstance(error, asyncio.CancelledError) else None
            try:
                await self._tasks.__aexit__(type(cancelled) if cancelled else None, cancelled, trace)
            finally:
                self._scratch.__exit__()

    @property
    def running(self) -> tuple[str, ...]:
        """Names of the roles that are there, in start order."""
        return tuple(self._roles)

    def pid(self, name: str) -> int:
        """Pid of a running role's first process; `RoleError` if the role is not running."""
        return self._role(name).pid

    async def start(self, spec: ProcessSpec) -> None:
        """Start a role; returns once its process exists, `RoleError` if it cannot. `StateError` if it runs already.

        A command that does not exist shows as an exit with code 1 and a log line. On cancel: nothing is started,
        or it is killed when the block is left.
        """
        if spec.name in self._roles:
            raise StateError(f"{spec.name} is running already")
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        header = f"{spec.name} started {started}: {' '.join(shlex.join(spec.command).split())}"
        log = RoleLog(
            spec.name,
            spec.log_path,
            header,
            echo=self._echo,
            echo_line=self._echo_line,
            secrets=spec.secrets,
            on_unwritten=self._on_unwritten,
        )
        role = _Role(spec=spec, log=log)
        self._roles[spec.name] = role  # before the first await, so that two starts of one role cannot cross
        read_fd, write_fd = os.pipe()
        try:
            process = await self._spawn(role, write_fd)
        except BaseException as error:
            os.close(read_fd)
            role.log.close()
            del self._roles[spec.name]
            role.gone.set()
            if isinstance(error, OSError):
                raise RoleError(f"cannot start {spec.name}: {error}; are processes or memory exhausted?") from error
            raise
        finally:
            os.close(write_fd)
        watch = self._tasks.create_task(self._watch(role, process, read_fd), name=f"watch {spec.name}")
        self._watches.add(watch)
        if role.asked:  # somebody stopped it before it was there
            role.group.signal(signal.SIGTERM)
        watch.add_done_callback(self._watches.discard)

    async def stop(self, name: str, at_once: bool = False) -> Exit | None:
        """SIGTERM, SIGKILL at the deadline; returns when every process of the role is gone, None if none was there.

        `at_once` sends SIGKILL first, also to a role that is being stopped in order.

        `DeadlineError` if SIGKILL does not help either. On cancel: the signals already sent work on, and the
        watch still kills at the deadline what is left once the role's first process has ended.
        """
        role = self._roles.get(name)
        if role is None:
            return None
        if at_once:
            role.hurry()
        elif not role.asked:
            role.asked = True
            role.kill_at = time.monotonic() + self._stop_deadline_s
            role.group.signal(signal.SIGTERM)
        return await self._wait_gone(role)

    async def stop_all(self, order: Sequence[Sequence[str]], at_once: bool = False) -> None:
        """Stop the roles in the written order: those of a group together, one group after the other; then, together,
        those that it does not name.

        Names that don't run are skipped. `at_once` sends SIGKILL to everything first, which also ends an orderly
        `stop_all` that is under way. Raises as `stop` does, for several roles at once in an exception group; on
        cancel: as `stop`.
        """
        if at_once:
            for role in self._roles.values():
                role.hurry()
        for group in order:
            await together(self.stop, group)
        await together(self.stop, self.running)

    def lost(self, name: str) -> bool:
        """Whether the role's host is lost, which this one is not."""
        return False

    def kill(self, name: str) -> None:
        """SIGKILL to every process of a role, as a crash would: the end arrives in `exits`. `RoleError` if absent."""
        self._role(name).group.signal(signal.SIGKILL)

    def _role(self, name: str) -> _Role:
        try:
            return self._roles[name]
        except KeyError:
            raise RoleError(f"{name} is not running") from None

    async def _spawn(self, role: _Role, write_fd: int) -> asyncio.subprocess.Process:
        mine = {PARENT_ENV: str(os.getpid()), MARK_ENV: role.group.mark, "PYTHONUNBUFFERED": "1"} | away_from_here()
        # a log is UTF-8 whatever the user's terminal is, and no character of a prompt ends a role that prints it
        mine["PYTHONIOENCODING"] = "utf-8:backslashreplace"
        if self._temporary is not None and "TMPDIR" not in role.spec.env:
            mine["TMPDIR"] = str(self._temporary)
        # A pipe of our own: asyncio's would make `wait` depend on strangers that hold it open.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "opd_async.process", *role.spec.command),
            env={**os.environ, **role.spec.env, **mine},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write_fd,
            stderr=write_fd,
            start_new_session=True,
        )
        role.pid = role.group.leader = process.pid
        return process

    async def _watch(self, role: _Role, process: asyncio.subprocess.Process, read_fd: int) -> None:
        async with asyncio.TaskGroup() as logs:
            log = logs.create_task(role.log.follow(read_fd), name=f"log {role.spec.name}")
            code = await process.wait()
            if not role.asked:
                role.kill_at = time.monotonic()
            survivors = await role.group.wait_gone(lambda: role.kill_at, KILL_DEADLINE_S)
            await asyncio.wait([log], timeout=LOG_DEADLINE_S)
            log.cancel()
        if survivors:
            self._echo(f"{role.spec.name} | processes {survivors} survive SIGKILL: they hang inside the kernel")
        role.log.close()
        role.end = Exit(role.spec.name, code, role.log.tail)
        del self._roles[role.spec.name]
        role.gone.set()
        if not role.asked:
            await self.exits.put(role.end)

    async def _wait_gone(self, role: _Role) -> Exit | None:
        """Wait for the watch to see the role's end, with SIGKILL at `kill_at`."""
        while not role.gone.is_set():
            late = time.monotonic() - role.kill_at
            if late >= KILL_DEADLINE_S + LOG_DEADLINE_S:
                raise DeadlineError(
                    f"{role.spec.name} (pid {role.pid}) is still there {late:.0f} s after SIGKILL: "
                    "it hangs inside the kernel; look at its disk and GPU with dmesg"
                )
            if late >= 0:
                role.group.signal(signal.SIGKILL)
            try:
                await asyncio.wait_for(role.gone.wait(), timeout=-late if late < 0 else 1.0)
            except TimeoutError:
                continue
        return role.end
