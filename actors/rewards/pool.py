"""Judge responses in processes of their own, within a deadline.

    rollout actor -> RewardPool.reward -> a worker with room -> reward, or the kind of failure
                                            | past its deadline: killed, and started anew

    loop          waits for                             unblocked by
    run (each)    the worker to be ready, its answers   the worker; its end
    reward        a worker with room, then its answer   an answer; a worker that is ready; the deadline

A failure is never a reward of zero: it is counted by kind, and the sample goes on without a reward.
On cancel: workers are killed, requests under way are dropped with their callers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.rewards.worker import READY, TIMED_OUT, frame, read_frame
from opd_async.config.learning import RewardSection
from opd_async.errors import RoleError
from opd_async.keys import is_key

log = logging.getLogger(__name__)

GRACE_S = 1.0
"""How much longer than the rule's own timeout a worker may take to answer before it is killed."""
START_DEADLINE_S = 60.0
MAX_FALSE_STARTS = 3
"""Workers in a row that end before they are ready: the rule cannot be loaded here."""
TRIES = 2
"""A request whose worker died of another one is tried again."""


class WorkerGoneError(Exception):
    """The worker ended with the request unanswered."""


@dataclass(frozen=True, slots=True)
class Reward:
    """What a response earned, or None and the kind of failure: `timeout`, `error`, `worker_died`."""

    value: float | None
    failure: str = ""


@dataclass(slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    writer: asyncio.StreamWriter
    ready: bool = False
    pending: dict[int, asyncio.Future[tuple[float | None, str]]] = field(default_factory=dict)

    def kill(self) -> None:
        """End the process; its reader then fails what is pending."""
        self.ready = False
        if self.process.returncode is None:
            self.process.kill()


class RewardPool:
    """`section.workers` processes. Run `run()` once per worker as a task; `reward` may be called meanwhile."""

    def __init__(self, section: RewardSection, plan_file: Path) -> None:
        self._section = section
        self._plan_file = plan_file
        self._workers: list[_Worker] = []
        self._changed = asyncio.Condition()
        self._ids = itertools.count()
        # a rule by regular expression or sympy blocks its process: one at a time, so that its deadline is its own
        self._room = section.concurrency if section.kind.facts.function else 1

    async def reward(
        self, prompt: NDArray[np.int32], response: NDArray[np.int32], label: str, metadata: str, finished: bool
    ) -> Reward:
        """Judge one response: int32 ids of prompt and response, the prompt's label and metadata (JSON)."""
        request = (prompt.tobytes(), response.tobytes(), label, metadata, finished)
        for _ in range(TRIES):
            worker = await self._free_worker()
            try:
                value, problem = await self._ask(worker, request)
            except WorkerGoneError:
                continue
            except TimeoutError:
                worker.kill()
                return Reward(None, TIMED_OUT)
            if value is None:
                log.warning("no reward for a response: %s", problem)
                return Reward(None, TIMED_OUT if problem == TIMED_OUT else "error")
            return Reward(value)
        return Reward(None, "worker_died")

    async def _free_worker(self) -> _Worker:
        """A ready worker with room, the one with the most; workers come back by themselves, or `run` raises."""

        def free() -> list[_Worker]:
            return [worker for worker in self._workers if worker.ready and len(worker.pending) < self._room]

        async with self._changed:
            await self._changed.wait_for(free)
            return min(free(), key=lambda worker: len(worker.pending))

    async def _ask(self, worker: _Worker, request: tuple[object, ...]) -> tuple[float | None, str]:
        number = next(self._ids)
        answer: asyncio.Future[tuple[float | None, str]] = asyncio.get_running_loop().create_future()
        worker.pending[number] = answer
        try:
            worker.writer.write(frame([number, *request]))
            async with asyncio.timeout(self._section.timeout_s + GRACE_S):
                return await answer
        finally:
            worker.pending.pop(number, None)
            async with self._changed:
                self._changed.notify_all()

    async def run(self) -> None:
        """Keep one worker alive. Raises `RoleError` when none will start."""
        false_starts = 0
        while True:
            worker, reader = await self._start()
            try:
                false_starts = 0 if await self._follow(worker, reader) else false_starts + 1
            finally:
                self._workers.remove(worker)
                worker.kill()
                worker.writer.close()
                for answer in worker.pending.values():
                    if not answer.done():
                        answer.set_exception(WorkerGoneError())
                await worker.process.wait()
            log.warning("a reward worker ended (%s)", worker.process.returncode)
            if false_starts >= MAX_FALSE_STARTS:
                raise RoleError(f"{false_starts} reward workers in a row ended before they were ready; see this log")

    async def _start(self) -> tuple[_Worker, asyncio.StreamReader]:
        mine, theirs = socket.socketpair()
        command = (sys.executable, "-m", "opd_async.actors.rewards.worker", "--plan", str(self._plan_file))
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(*command, "--fd", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                # a reward may be anybody's function
                env={name: value for name, value in os.environ.items() if not is_key(name)},
            )
        reader, writer = await asyncio.open_unix_connection(sock=mine)
        worker = _Worker(process, writer)
        self._workers.append(worker)
        return worker, reader

    async def _follow(self, worker: _Worker, reader: asyncio.StreamReader) -> bool:
        """Hand answers out until the worker ends; whether it was ever ready."""
        try:
            async with asyncio.timeout(START_DEADLINE_S) as starting:
                while True:
                    number, value, problem = await read_frame(reader)
                    if number == READY:
                        starting.reschedule(None)
                        worker.ready = True
                        async with self._changed:
                            self._changed.notify_all()
                    elif (answer := worker.pending.get(number)) is not None and not answer.done():
                        answer.set_result((value, problem))
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            return starting.when() is None
