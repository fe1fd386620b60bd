"""The tools of episodes (`rollout.tools`) in processes of their own, each call within a deadline.

    session.call -> ToolPool.call -> a worker that is free -> what the tool says, or what went wrong, as text
                                       | past the deadline: killed with all that it started, and started anew

    loop        waits for                               unblocked by
    run (each)  the worker to be ready; a call; its end the worker; an episode
    call        a worker that is free, its answer       an answer; the deadline; the worker's end

Whatever a tool does, the student is told of it and goes on; it is counted. On cancel: the worker is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_async.actors.rollout.tool_calls import ToolCall
from opd_async.actors.rollout.tool_worker import ANSWERED, LENGTH, frame, opened
from opd_async.config.generating import ToolsSection
from opd_async.errors import RoleError
from opd_async.keys import is_key
from opd_async.role import Role

log = logging.getLogger(__name__)

MODULE = "opd_async.actors.rollout.tool_worker"
START_DEADLINE_S = 60.0
MAX_FALSE_STARTS = 3
"""Workers in a row that end before they are ready: the tools cannot be loaded here."""
WAITING_PER_WORKER = 64


@dataclass(frozen=True, slots=True)
class _Asked:
    call: ToolCall
    answer: asyncio.Future[tuple[str, str]]


class ToolPool:
    """`section.workers` processes. Run `run()` once per worker as a task; `call` may be called meanwhile."""

    def __init__(self, role: Role, section: ToolsSection) -> None:
        self._role = role
        self._section = section
        self._asked: asyncio.Queue[_Asked] = asyncio.Queue(WAITING_PER_WORKER * section.workers)
        self._schemas: tuple[Mapping[str, Any], ...] = ()
        self._known = asyncio.Event()

    async def schemas(self) -> tuple[Mapping[str, Any], ...]:
        """Each tool in the form of OpenAI's API. On cancel: nothing has changed."""
        if self._section.functions:
            await self._known.wait()  # or `run` raises
        return self._schemas

    async def call(self, call: ToolCall) -> str:
        """What a tool says, or what went wrong with it; counted by kind. On cancel: the answer is dropped."""
        names = [tool["function"]["name"] for tool in await self.schemas()]
        if call.name not in names:
            kind, text = "unknown", f"there is no tool {call.name!r:.80}; there are {', '.join(names) or 'none'}"
        else:
            asked = _Asked(call, asyncio.get_running_loop().create_future())
            await self._asked.put(asked)
            kind, text = await asked.answer
        self._role.metrics["opd_rollout_tool_calls_total"].labels(kind).inc()
        return text if kind in (ANSWERED, "cut") else f"error: {text}"

    async def run(self) -> None:
        """Keep one worker alive and busy. Raises `RoleError` when none will start."""
        false_starts = 0
        while True:
            process = await self._start()
            try:
                if await self._ready(process):
                    false_starts = 0
                    await self._follow(process)
                else:
                    false_starts += 1
            finally:
                _kill(process)
                await process.wait()
            if false_starts >= MAX_FALSE_STARTS:
                raise RoleError(f"{false_starts} tool workers in a row ended before they were ready; see this log")

    async def _start(self) -> asyncio.subprocess.Process:
        section = self._section
        limits = ("--memory-mib", str(section.memory_mib), "--characters", str(section.result_characters))
        return await asyncio.create_subprocess_exec(
            *(*(section.command or (sys.executable,)), "-m", MODULE, *limits, *section.functions),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # what a tool starts is killed with it
            start_new_session=True,
            # a tool may be anybody's function
            env={name: value for name, value in os.environ.items() if not is_key(name)},
        )

    async def _ready(self, process: asyncio.subprocess.Process) -> bool:
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                _, schemas, _ = await _read(process)
        except (asyncio.IncompleteReadError, TimeoutError):
            log.warning("a tool worker was not ready within %.0f s, or ended", START_DEADLINE_S)
            return False
        self._schemas = tuple(json.loads(schemas))
        self._known.set()
        return True

    async def _follow(self, process: asyncio.subprocess.Process) -> None:
        """Hand calls to a worker until it has ended, or must."""
        while True:
            asked = await self._asked.get()
            if asked.answer.done():  # its episode is over
                continue
            kind, text = await self._answer(process, asked.call)
            if not asked.answer.done():
                asked.answer.set_result((kind, text))
            if kind in ("deadline", "died"):
                return

    async def _answer(self, process: asyncio.subprocess.Process, call: ToolCall) -> tuple[str, str]:
        assert process.stdin is not None
        try:
            async with asyncio.timeout(self._section.deadline_s):
                process.stdin.write(frame([call.name, json.dumps(dict(call.arguments))]))
                await process.stdin.drain()
                kind, text, cut = await _read(process)
        except TimeoutError:
            return "deadline", f"no answer within {self._section.deadline_s:g} s"
        except (asyncio.IncompleteReadError, ConnectionError):
            return "died", "the process of the tool has ended"
        if cut:
            text += f"\n[{cut} more characters]"
        return ("cut" if cut and kind == ANSWERED else kind), text


async def _read(process: asyncio.subprocess.Process) -> tuple[str, str, int]:
    assert process.stdout is not None
    (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
    kind, text, cut = opened(await process.stdout.readexactly(length))
    return kind, text, cut


def _kill(process: asyncio.subprocess.Process) -> None:
    """End a worker and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
