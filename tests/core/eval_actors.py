"""Rollout actors as evaluations know them."""

from __future__ import annotations

from collections.abc import Callable

from opd_async.transport.messages import Lease


class OneActor:
    """An actor that does at once what the test does with a lease."""

    def __init__(self, take: Callable[[Lease], None]) -> None:
        self._take = take

    async def actor_for(self, number: int) -> str:
        return "rollout-0"

    async def send(self, role: str, message: Lease) -> bool:
        self._take(message)
        return True
