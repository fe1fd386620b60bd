"""A router and its engines as one: requests go through the one, pauses and aborts to all others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import numpy as np
import pytest

from opd_async.actors.client.engine_client import EngineClient, Sampling
from opd_async.actors.client.replies import Delta
from opd_async.actors.client.routed_client import RoutedClient
from opd_async.actors.rollout.generation import Student
from opd_async.errors import EngineError


class Fake:
    """Notes what it is asked; a dead one refuses."""

    def __init__(self, url: str, dead: bool = False) -> None:
        self.url, self.dead, self.asked = url, dead, list[str]()

    def _answer(self, what: str) -> None:
        self.asked.append(what)
        if self.dead:
            raise EngineError(f"{self.url} is gone")

    async def stream(self, *_: Any) -> AsyncIterator[Delta]:
        self._answer("stream")
        yield Delta(np.zeros(1, np.int32), np.zeros(1, np.float32), "0", None, False)

    async def pause(self, mode: str) -> dict[str, int]:
        self._answer(f"pause {mode}")
        return {self.url: 3}

    async def abort_all(self) -> None:
        self._answer("abort")

    async def resume(self) -> None:
        self._answer("resume")


def routed(*engines: Fake) -> tuple[RoutedClient, Fake]:
    router = Fake("router")
    return RoutedClient(cast(EngineClient, router), [cast(EngineClient, engine) for engine in engines]), router


async def test_each_call_goes_where_it_belongs() -> None:
    engines = [Fake("a"), Fake("b")]
    client, router = routed(*engines)
    deltas = [
        d
        async for d in client.stream(
            "rid",
            np.zeros(2, np.int32),
            Sampling(temperature=1.0, top_p=1.0, top_k=-1, max_new_tokens=4, stop_token_ids=(), stream_interval=1),
            "",
        )
    ]
    assert len(deltas) == 1
    assert await client.pause("in_place") == {"a": 3, "b": 3}
    await client.abort_all()
    await client.resume()
    assert client.url == "router" and router.asked == ["stream"]
    assert [engine.asked for engine in engines] == [["pause in_place", "abort", "resume"]] * 2


async def test_a_dead_engine_keeps_nothing_from_the_others() -> None:
    engines = [Fake("a", dead=True), Fake("b")]
    client, _ = routed(*engines)
    assert await client.pause("in_place") == {"b": 3}
    for call in (client.abort_all, client.resume):
        with pytest.raises(EngineError, match="a is gone"):
            await call()
    assert engines[1].asked == ["pause in_place", "abort", "resume"]


async def test_engines_behind_a_router_are_paused_although_one_is_lost() -> None:
    alone, behind = (
        Student(client=cast(EngineClient, Fake("a")), urls=("a",)),
        Student(client=routed(Fake("a"))[0], urls=("a", "b")),
    )
    for student in (alone, behind):
        student.gate.set()
        student.lost()
        assert not student.gate.is_set()
    assert alone.down and not behind.down
