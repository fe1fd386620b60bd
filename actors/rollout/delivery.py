"""The chunks of a rollout actor on their way: kept until the intake has acknowledged them, and sent again if late."""

from __future__ import annotations

from collections.abc import Iterable

from opd_async.actors.rollout.downstream import Downstream
from opd_async.actors.rollout.generation import Generation
from opd_async.role import Role
from opd_async.scheduling.outbox import Outbox
from opd_async.transport import messages as m
from opd_async.transport.owed import Owed


class Delivery:
    """The outbox of one rollout actor and the sockets that empty it."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._metrics = role.metrics
        self._after_s = role.plan.topology.rollout.resend_after_s
        self._outbox = Outbox()
        self._downstream = Downstream(role.context, role.plan, role.name)

    def open(self, lease: m.Lease) -> None:
        """A training lease begins: from now on its tokens are listed when generation is paused."""
        self._outbox.open(
            lease.sample_id,
            lease.attempt,
            lease.route,
            lease.prompt,
            lease.prefix,
            teacher_prompt=lease.teacher_prompt,
            contrast_prompt=lease.contrast_prompt,
        )

    def begun(self, generation: Generation) -> None:
        """The sample of a lease begins with another prompt than it was opened with; nothing of it was sent."""
        if generation.lease.kind == m.LeaseKind.TRAIN:
            self.open(generation.lease)

    async def send_due(self, generation: Generation, chunk_tokens: int) -> None:
        """Send what is due of a training response, in chunks of `chunk_tokens` tokens at least.

        On cancel: what was due is in the outbox, which sends it again.
        """
        now = self._role.clock.now()
        # all are in the outbox before the first is awaited: what `generation` gave away must not be lost by a cancel
        due = [self._outbox.add(chunk, now) for chunk in generation.due_chunks(chunk_tokens, self._role.mine.index)]
        if due:
            route = self._outbox.route_of(generation.lease.sample_id)
            self._metrics["opd_rollout_chunks_total"].inc(len(due))
            for chunk in due:
                await self._downstream.send(route, chunk)

    async def send_all(self, generation: Generation) -> None:
        """Send everything that is there of a training response; nothing of others. On cancel: as `send_due`."""
        if generation.lease.kind == m.LeaseKind.TRAIN:
            await self.send_due(generation, 1)

    async def resend(self) -> None:
        """Send chunks again that nobody acknowledged in time. On cancel: they stay in the outbox."""
        while True:
            await self._role.clock.sleep(min(1.0, self._after_s / 4))
            await self._send_again(self._outbox.overdue(self._role.clock.now(), self._after_s))
            self._metrics["opd_rollout_unacknowledged_chunks"].set(self._outbox.unacknowledged)

    async def teacher_restarted(self, route: int) -> None:
        """Send everything again that a teacher actor has lost. On cancel: it stays in the outbox, which resends it."""
        await self._send_again(self._outbox.teacher_restarted(route, self._role.clock.now()))

    async def _send_again(self, chunks: Iterable[tuple[int, m.Chunk]]) -> None:
        for route, chunk in chunks:
            self._role.count("resent_chunks")
            self._metrics["opd_rollout_resent_chunks_total"].inc()
            await self._downstream.send(route, chunk)

    def acknowledge(self, acks: m.Acks) -> None:
        """Forget what the intake holds."""
        now = self._role.clock.now()
        for sample_id, attempt, end in zip(acks.sample_ids, acks.attempts, acks.ends, strict=True):
            self._outbox.acknowledge(int(sample_id), int(attempt), int(end), now)

    def owed(self) -> Owed:
        """The tokens that exist of every sample that is generated here, or waits for acknowledgement."""
        return Owed.of(self._outbox.owed())

    def forget(self) -> None:
        """Drop every sample: the run goes back to a checkpoint."""
        self._outbox.clear()

    def close(self) -> None:
        """Close the sockets; queued chunks may still leave."""
        self._downstream.close()
