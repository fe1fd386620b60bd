"""The start of a run: who is waited for is said as each comes up, and who never comes is named."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from opd_async.errors import DeadlineError, RoleError
from opd_async.run.arrivals import all_up, listed


def test_everybody_is_named_as_they_come() -> None:
    said: list[str] = []

    async def main() -> dict[str, Any]:
        gates = {name: asyncio.get_running_loop().create_future() for name in ("a", "b", "c")}

        async def arrive() -> None:
            for name in ("b", "c", "a"):
                gates[name].set_result(name.upper())
                for _ in range(5):
                    await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            everybody = group.create_task(all_up({name: _of(gate) for name, gate in gates.items()}, 600.0, said.append))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            group.create_task(arrive())
        return everybody.result()

    assert asyncio.run(main()) == {"a": "A", "b": "B", "c": "C"}
    assert said == ["waiting for a, b, c", "b: there; waiting for a, c", "c: there; waiting for a"]


async def _of(gate: asyncio.Future[str]) -> str:
    return await gate


async def _never() -> None:
    await asyncio.Event().wait()


async def _at_once() -> None:
    pass


async def _broken() -> None:
    raise RoleError("it holds another model")


def test_who_never_comes_is_named() -> None:
    waits: dict[str, Coroutine[Any, Any, Any]] = {"one": _at_once(), "two": _never(), "three": _never()}
    with pytest.raises(DeadlineError, match="timed out after 0 s waiting for two, three; see the logs"):
        asyncio.run(all_up(waits, 0.01, lambda line: None))


def test_the_reason_of_one_that_cannot_come_is_the_error() -> None:
    with pytest.raises(RoleError, match="it holds another model"):
        asyncio.run(all_up({"one": _never(), "two": _broken()}, 600.0, lambda line: None))


def test_a_crowd_is_counted() -> None:
    assert listed(["a", "b", "c", "d"]) == "a, b, c, d"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
