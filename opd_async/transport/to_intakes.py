"""Scored chunks to the intake that holds their sample: sample n belongs to intake n modulo their number."""

from __future__ import annotations

from collections.abc import Sequence

import zmq.asyncio

from opd_async.transport.channels import Push
from opd_async.transport.door import Passport
from opd_async.transport.messages import ScoredChunk


def intake_of(sample_id: int, intakes: int) -> int:
    """Index of the intake that holds a sample, of so many."""
    return sample_id % intakes


class ToIntakes:
    """One socket to each intake."""

    def __init__(self, context: zmq.asyncio.Context, addresses: Sequence[str], passport: Passport | None) -> None:
        """Shows `passport` where the launcher gave keys."""
        self._pushes = [Push(context, address, passport=passport) for address in addresses]

    async def send(self, chunk: ScoredChunk) -> None:
        """Queue a chunk for its intake; waits at that one's high-water mark. On cancel: it may or may not have left."""
        await self._pushes[intake_of(chunk.sample_id, len(self._pushes))].send(chunk)

    def close(self) -> None:
        """Close the sockets; queued chunks may still leave."""
        for push in self._pushes:
            push.close()
