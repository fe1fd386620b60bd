"""One incarnation of an agent: start and stop processes for the launcher, and tell it how they end.

launcher <-> AgentEnd <-> obey -> Supervisor -> processes -> report -> launcher

loop      waits for                       unblocked by
obey      a message of the launcher       the launcher
report    the end of a process            the supervisor
beat      its next beat, or the end of    the clock
          the lease (`lease.py`)
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from opd_async.clock import OFFSET_FILE_ENV
from opd_async.cluster.clock_offset import ClockOffset, Reading
from opd_async.cluster.interfaces import Face
from opd_async.cluster.lease import Lease, beat_seconds
from opd_async.cluster.line import AgentEnd
from opd_async.cluster.supervisor import Exit, ProcessSpec, Supervisor
from opd_async.data.hub import fetch_cached, is_cached_model
from opd_async.errors import InputError, OpdError, RoleError
from opd_async.files import write_atomically
from opd_async.plan.free_ports import free_ports, unusable
from opd_async.transport import messages as m

MAX_LINES = 1000
"""Loud lines kept for the launcher until the next beat; older ones are in the processes' logs all the same."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What an agent says of its host."""

    name: str
    face: Face
    gpus: int
    cores: int
    versions: dict[str, str]


class LoudLines:
    """Loud lines on their way to the launcher."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self._lost = 0

    def add(self, line: str) -> None:
        self._lost += len(self._lines) == MAX_LINES
        self._lines.append(line)

    def unwritten(self, lines: int) -> None:
        self._lost += lines

    def take(self) -> m.Lines | None:
        """Return what there is to say, and forget it."""
        if not self._lines and not self._lost:
            return None
        message = m.Lines(list(self._lines), self._lost)
        self._lines.clear()
        self._lost = 0
        return message


class Service:
    """The loops of one incarnation."""

    def __init__(
        self,
        end: AgentEnd,
        supervisor: Supervisor,
        lines: LoudLines,
        facts: HostFacts,
        welcome: m.Welcome,
        claims: ExitStack,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`claims` keeps what is this incarnation's: ports, a folder; `wall` is the host's clock."""
        self._end = end
        self._supervisor = supervisor
        self._lines = lines
        self._facts = facts
        self._claims = claims
        self._beat_s = beat_seconds(welcome.fence_s)
        self._fence_s = welcome.fence_s
        self._lease = Lease(welcome.fence_s, time.monotonic())
        self._starts: dict[str, str] = {}
        """The incarnation of each process."""
        self._unseen: dict[int, m.ProcessEnded] = {}
        self._ends = 0
        self._wall = wall
        self._offset = ClockOffset()
        self._told: Reading | None = None
        folder = Path(claims.enter_context(tempfile.TemporaryDirectory(prefix="opd-agent-")))
        self._offset_file = folder / "clock_offset_s"

    async def obey(self) -> m.Leave:
        """Do what the launcher asks for, until it lets the host go. On cancel: requests under way are given up."""
        work: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as group:
            while True:
                message = await self._end.receive()
                match message:
                    case m.Leave():
                        for task in work:
                            task.cancel()
                        return message
                    case m.AgentBeat():
                        self._lease.echoed(message.number)
                        self._set_clock(message)
                    case m.EndSeen():
                        self._unseen.pop(message.number, None)
                    case m.KillProcess():
                        if message.role in self._supervisor.running:
                            self._supervisor.kill(message.role)
                    case m.FindPorts() | m.LookAt() | m.StartProcess() | m.StopProcess():
                        task = group.create_task(self._answer(message), name=f"request {message.request}")
                        work.add(task)
                        task.add_done_callback(work.discard)
                    case _:
                        continue

    async def report(self) -> m.Leave:
        """Tell the launcher of every end. On cancel: those that it has not seen are forgotten with the incarnation."""
        while True:
            ended = await self._supervisor.exits.get()
            self._ends += 1
            role = ended.name
            killed_by, exit_code = codes(ended)
            end = m.ProcessEnded(
                number=self._ends,
                role=role,
                incarnation=self._starts.get(role, ""),
                exit_code=exit_code,
                killed_by=killed_by,
                lines=list(ended.tail),
            )
            self._unseen[self._ends] = end
            await self._say_lines()
            await self._end.send(end)

    async def beat(self) -> m.Leave:
        """Beat until the lease has run out. On cancel: the launcher hears nothing more."""
        while (left_s := self._lease.left_s(time.monotonic())) > 0:
            number = self._lease.beat(time.monotonic())
            self._offset.beat(number, self._wall())
            try:
                async with asyncio.timeout(min(self._beat_s, left_s)):
                    await self._end.send(m.AgentBeat(number))
                    await self._say_lines()
                    for end in list(self._unseen.values()):
                        await self._end.send(end)
            except TimeoutError:
                continue
            await asyncio.sleep(min(self._beat_s, max(self._lease.left_s(time.monotonic()), 0.0)))
        return m.Leave(f"the launcher was not heard for {self._fence_s:g} s: ended every process", True, self._beat_s)

    def _set_clock(self, echo: m.AgentBeat) -> None:
        """Tell the processes of this host how far its clock is from the launcher's."""
        self._offset.echoed(echo.number, echo.clock_s, self._wall())
        best = self._offset.best
        if best is not None and best != self._told:
            fresh = self._offset_file.with_suffix(".new")
            with suppress(OSError):  # without room for it, they know what they knew
                fresh.write_text(repr(best.offset_s))  # not `write_atomically`: no loop waits for a disk here
                fresh.replace(self._offset_file)
                self._told = best

    async def _say_lines(self) -> None:
        if (lines := self._lines.take()) is not None:
            await self._end.send(lines)

    async def _answer(self, request: m.FindPorts | m.LookAt | m.StartProcess | m.StopProcess) -> None:
        numbers: list[int] = []
        problem = None
        try:
            numbers = await self._carry_out(request)
        except (OpdError, OSError) as error:
            problem = str(error)
        await self._end.send(m.Answer(request.request, problem, numbers))

    async def _carry_out(self, request: m.FindPorts | m.LookAt | m.StartProcess | m.StopProcess) -> list[int]:
        match request:
            case m.FindPorts():
                return self._ports(request)
            case m.LookAt():
                await asyncio.to_thread(look_at, request)
                return []
            case m.StartProcess():
                self._starts[request.role] = request.incarnation
                command = (sys.executable, *request.words[1:]) if request.own_python else tuple(request.words)
                own = {**self._facts.face.environment, OFFSET_FILE_ENV: str(self._offset_file)}
                env = visible_devices({**own, **request.env}, os.environ)
                secrets = tuple(request.secrets)
                await self._supervisor.start(ProcessSpec(request.role, command, env, Path(request.log), secrets))
                return []
            case m.StopProcess():
                ended = await self._supervisor.stop(request.role, request.at_once)
                return [] if ended is None else list(codes(ended))

    def _ports(self, request: m.FindPorts) -> list[int]:
        address = self._facts.face.address
        for port in request.ports:
            if reason := unusable(address, port):
                raise InputError(
                    f"network.base_port: port {port} of {address} {reason}; write another base_port, or 0 to take "
                    "free ones"
                )
        return free_ports(address, request.count, self._claims)


def codes(ended: Exit) -> tuple[int, int]:
    """The signal that ended a process, and its exit code; one of them is 0."""
    return (-ended.code, 0) if ended.code < 0 else (0, ended.code)


def visible_devices(env: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """`env` with its devices counted among those that this agent may use (`CUDA_VISIBLE_DEVICES` of its own).

    Raises `RoleError` where the agent has fewer.
    """
    if not env.get(VISIBLE) or not own.get(VISIBLE):
        return dict(env)
    mine = own[VISIBLE].split(",")
    wanted = [int(index) for index in env[VISIBLE].split(",")]
    if max(wanted) >= len(mine):
        raise RoleError(
            f"{VISIBLE}={own[VISIBLE]} here, and device {max(wanted)} was asked for; see cluster.gpus_per_node"
        )
    return {**env, VISIBLE: ",".join(mine[index] for index in wanted)}


def look_at(request: m.LookAt) -> None:
    """Go to the launcher's folder, prove that this host shares its files, and fetch models of the hub that it lacks.

    Raises `InputError` that names a path.
    """
    try:
        os.chdir(request.folder)
    except OSError as error:
        raise InputError(
            f"{request.folder}: {error.strerror}, where the launcher was started; start it in a folder that every "
            "host has"
        ) from None
    seen = Path(request.seen)
    try:
        content = seen.read_text(encoding="utf-8")
    except OSError as error:
        content = error.strerror or ""
    if content != request.nonce:
        raise InputError(
            f"{seen.parent.absolute()} (run_dir): what the launcher writes there is not seen here ({content:.40}); "
            "write a folder of a file system that every host has mounted"
        )
    write_atomically(Path(request.mine), request.nonce)
    for path in map(Path, request.paths):
        if is_cached_model(path):
            fetch_cached(path)
        elif not path.exists():
            raise InputError(f"{path.absolute()}: not there; put it on every host, or on a shared file system")
