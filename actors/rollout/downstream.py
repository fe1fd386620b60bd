"""Where a rollout actor's chunks go: to the teacher actors, or, where none scores, straight to the intake."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import zmq.asyncio

from opd_async.plan.plan import Plan
from opd_async.transport.channels import Push
from opd_async.transport.door import Passport
from opd_async.transport.messages import Chunk, ScoredChunk
from opd_async.transport.to_intakes import ToIntakes


class Downstream:
    """The sockets of a rollout actor for chunks. A route, which leases bring, is the index of a teacher
    actor, 0 where there is none."""

    def __init__(self, context: zmq.asyncio.Context, plan: Plan, sender: str) -> None:
        """`sender` is the rollout actor's name, which stands in for a teacher's in chunks that nobody scored."""
        self._scored = plan.topology.opd.on_engines
        self._sender = sender
        passport = Passport.of_environment(sender) if plan.guards_chunks else None
        chunks, scored = (plan.chunks, ()) if self._scored else ((), plan.scored)
        self._pushes = [Push(context, address, passport=passport) for address in chunks]
        self._intakes = ToIntakes(context, scored, passport)

    async def send(self, route: int, chunk: Chunk) -> None:
        """Hand a chunk over; waits at the receiver's high-water mark. On cancel: it may or may not have been sent."""
        if self._scored:
            await self._pushes[route].send(chunk)
        else:
            await self._intakes.send(unscored(chunk, self._sender))

    def close(self) -> None:
        """Close the sockets; queued chunks may still leave."""
        for push in self._pushes:
            push.close()
        self._intakes.close()


def unscored(chunk: Chunk, sender: str) -> ScoredChunk:
    """The chunk as the intake takes it where no teacher engine scores: without a teacher's logprobs."""
    found = chunk.scored(sender, 0.0, np.zeros(0, np.float32))
    return replace(found, teacher_prompt=chunk.teacher_prompt, contrast_prompt=chunk.contrast_prompt)
