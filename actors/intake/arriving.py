"""Scored chunks as they arrive at an intake: believed, counted, and put into its assembler."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from opd_async.actors.intake.report import LatencyReservoir
from opd_async.config.topology import TrainOn
from opd_async.plan.chunk_bounds import ChunkBounds
from opd_async.role import ATTEMPT_FLOOR_ENV, Role
from opd_async.scheduling.assembly import Assembler, Verdict
from opd_async.transport import messages as m
from opd_async.transport.bounds import MAX_COUNT
from opd_async.transport.channels import Pull
from opd_async.transport.door import Door

log = logging.getLogger(__name__)


def attempt_floor() -> int:
    """Attempts below it belong to a time before the learner went back to a checkpoint."""
    return int(os.environ.get(ATTEMPT_FLOOR_ENV, "0"))


class Arriving:
    """The socket for scored chunks of one intake."""

    def __init__(self, role: Role, door: Door, malformed: Callable[[str], None]) -> None:
        plan = role.plan
        self._role, self._schedule = role, plan.topology.schedule
        self._floor = attempt_floor()
        self._latencies = LatencyReservoir()
        role.refresh = lambda: role.counters.update(self._latencies.quantiles())
        self._bounds = ChunkBounds(plan, door.keys)
        self._malformed = malformed
        guard = door if plan.guards_chunks else None
        self._pull = Pull(role.context, plan.scored[role.mine.index], malformed, door=guard)

    async def receive(
        self, assembler: Callable[[], Assembler], steps: Callable[[], int], taken: Callable[[int, Verdict], None]
    ) -> None:
        """Take scored chunks in; `steps` are taken so far, and `taken` hears of each sample with a chunk that is held.

        On cancel: chunks in the socket are lost, and sent again by the rollout actors.
        """
        while True:
            sender, chunk = await self._pull.receive_from()
            if not isinstance(chunk, m.ScoredChunk):
                self._malformed(f"a {type(chunk).__name__} among scored chunks")
                continue
            if problem := self._unbelievable(sender, chunk, steps()):
                self._count(Verdict.MALFORMED, chunk, problem)
                continue
            verdict = assembler().add(chunk, self._oldest(steps()))
            self._count(verdict, chunk)
            if verdict is Verdict.ACCEPTED or verdict is Verdict.DUPLICATE:
                taken(chunk.sample_id, verdict)

    def _unbelievable(self, sender: str | None, chunk: m.ScoredChunk, steps: int) -> str | None:
        """Why a chunk cannot be; what an earlier launch of the learner left under way may be, and is dropped later."""
        left_over = chunk.attempt < self._floor
        return self._bounds.of_scored(sender, chunk, newest=MAX_COUNT if left_over else steps)

    def _oldest(self, steps: int) -> int:
        """No token of older weights may be new: every step so far waited for them."""
        if self._schedule.train_on is not TrainOn.TOKENS or self._schedule.max_staleness is None:
            return 0
        return max(steps - self._schedule.max_staleness - 1, 0)

    def _count(self, verdict: Verdict, chunk: m.ScoredChunk, problem: str = "malformed") -> None:
        role = self._role
        if verdict is Verdict.ACCEPTED or verdict is Verdict.EARLY:
            role.count("tokens", len(chunk.token_ids))
            role.metrics["opd_intake_scored_tokens_total"].inc(len(chunk.token_ids))
            if chunk.finish is not None:
                self._latencies.add(chunk.latency_s)
        elif verdict is Verdict.MALFORMED:
            role.count("malformed_chunks")
            role.metrics["opd_intake_malformed_total"].labels("chunk").inc()
            log.warning("dropped a chunk of sample %d from %s: %s", chunk.sample_id, chunk.teacher_id, problem)
        else:
            role.count(f"{verdict.value}_chunks")
            role.metrics["opd_intake_duplicates_total"].inc()

    def close(self) -> None:
        """Close the socket."""
        self._pull.close()
