"""A server that was told to stop has no open stream; one that will not end its requests is named."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from opd_async.actors.client.engine_client import EngineClient
from opd_async.actors.rollout.abort_and_collect import abort_and_collect
from opd_async.clock import Clock
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

    async def stop(self, deadline_s: float = 30.0) -> None:
        streams = cast(Any, self.streams)
        await abort_and_collect(cast(EngineClient, self), lambda: list(streams), self.changed, deadline_s, Clock())


@pytest.mark.parametrize(("streams", "per_abort", "failures", "aborts"), [(0, 1, 0, 0), (5, 5, 0, 1), (5, 3, 1, 3)])
async def test_it_aborts_until_nothing_is_open(streams: int, per_abort: int, failures: int, aborts: int) -> None:
    server = Server(streams, per_abort, failures)
    await server.stop()
    assert (server.streams, server.aborts) == ([], aborts)


async def test_a_server_that_goes_on_is_named() -> None:
    with pytest.raises(DeadlineError, match=r"http://engine did not end its requests in 0 s: rid-0, rid-1, rid-2"):
        await Server(4, per_abort=0).stop(deadline_s=0.1)


async def test_streams_that_break_by_themselves_are_enough() -> None:
    server = Server(3, per_abort=0, failures=1000)

    async def die() -> None:
        server.streams.clear()
        async with server.changed:
            server.changed.notify_all()

    async with asyncio.TaskGroup() as group:
        group.create_task(server.stop())
        group.create_task(die())
    assert server.streams == []
