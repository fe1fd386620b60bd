"""A drained server has no open stream; one that will not end its requests is named."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from opd_async.actors.client.engine_client import EngineClient
from opd_async.actors.rollout.draining import drain
from opd_async.errors import DeadlineError, EngineError


class Stream:
    """Stands for a generation."""

    def __init__(self, rid: str) -> None:
        self.rid = rid


class Server:
    """Ends `per_abort` streams each time it is asked; fails the first `failures` times."""

    url = "http://engine"

    def __init__(self, streams: int, per_abort: int, failures: int = 0) -> None:
        self.streams = [Stream(f"rid-{i}") for i in range(streams)]
        self.changed = asyncio.Condition()
        self.aborts = 0
        self._per_abort, self._failures = per_abort, failures

    async def abort_all(self) -> None:
        self.aborts += 1
        if self.aborts <= self._failures:
            raise EngineError("no answer")
        del self.streams[: self._per_abort]
        async with self.changed:
            self.changed.notify_all()

    async def drain(self, deadline_s: float = 30.0) -> None:
        await drain(cast(EngineClient, self), lambda: cast(Any, list(self.streams)), self.changed, deadline_s)


@pytest.mark.parametrize(("streams", "per_abort", "failures", "aborts"), [(0, 1, 0, 0), (5, 5, 0, 1), (5, 3, 1, 3)])
def test_it_aborts_until_nothing_is_open(streams: int, per_abort: int, failures: int, aborts: int) -> None:
    async def run() -> Server:
        server = Server(streams, per_abort, failures)
        await server.drain()
        return server

    server = asyncio.run(run())
    assert (server.streams, server.aborts) == ([], aborts)


def test_a_server_that_goes_on_is_named() -> None:
    async def run() -> None:
        await Server(4, per_abort=0).drain(deadline_s=0.1)

    with pytest.raises(DeadlineError, match=r"http://engine did not end its requests in 0 s: rid-0, rid-1, rid-2"):
        asyncio.run(run())


def test_streams_that_break_by_themselves_are_enough() -> None:
    async def run() -> Server:
        server = Server(3, per_abort=0, failures=1000)

        async def die() -> None:
            server.streams.clear()
            async with server.changed:
                server.changed.notify_all()

        async with asyncio.TaskGroup() as group:
            group.create_task(server.drain())
            group.create_task(die())
        return server

    assert asyncio.run(run()).streams == []
