"""Run blocking work in threads that never hold up the end of the process.

The standard executors are joined at exit, however long their work takes: a broadcast that never comes would keep a
stopped engine alive until its deadline.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
Job = Callable[[], None]


class WorkerThread:
    """One daemon thread that runs functions in the order given. Its queue is bounded by its callers, who wait."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, function: Callable[[], T]) -> T:
        """Return the result of `function`, or raise its error. On cancel the function runs on without a listener."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def finish(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # None only where T is None

        def job() -> None:
            result, failure = None, None
            try:
                result = function()
            except BaseException as error:  # the edge of the thread: the caller gets every error
                failure = error
            if not loop.is_closed():
                loop.call_soon_threadsafe(finish, result, failure)

        self._jobs.put(job)
        return await future

    def stop(self) -> None:
        """End the thread after its queued jobs; does not wait."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


async def in_thread(name: str, function: Callable[[], T]) -> T:
    """Run one blocking function in a thread of its own."""
    worker = WorkerThread(name)
    try:
        return await worker.run(function)
    finally:
        worker.stop()
