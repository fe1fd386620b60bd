"""The gate between drain, weight update and an engine that comes back, without a single process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from opd_async.run.barrier import Barrier, BarrierState
from opd_async.transport import messages as m


def dispatcher() -> Any:
    """A dispatcher without actors that keeps what is sent to the intake and broadcast."""
    sent: list[Any] = []

    async def send(*message: Any) -> list[str]:
        sent.append(message[-1])
        return []

    evaluated = asyncio.Event()
    evaluated.set()
    return SimpleNamespace(up=lambda kind: [], broadcast=send, to_intake=send, evaluated=evaluated, sent=sent)


@pytest.mark.parametrize("drain_first", [True, False])
async def test_a_returning_engine_does_not_open_what_was_drained(drain_first: bool) -> None:
    barrier = Barrier(dispatcher())
    await barrier.open(1)
    if drain_first:
        await barrier.close(drain=True)
    await barrier.close()  # the update that the returning engine asked for
    if not drain_first:
        await barrier.close(drain=True)
    await barrier.open(1, new=False)
    assert barrier.state is BarrierState.DRAINED
    await barrier.open(2)
    assert barrier.state is BarrierState.OPEN


async def test_without_a_drain_a_returning_engine_opens() -> None:
    fake = dispatcher()
    barrier = Barrier(fake)
    await barrier.open(1)
    await barrier.close()
    await barrier.open(1, new=False)
    assert barrier.state is BarrierState.OPEN
    assert [message.version for message in fake.sent if isinstance(message, m.Resume)] == [
        1
    ] * 4  # teachers hear it too
