"""Assemble scored chunks, take steps, and feed the learner's ranks.

    scored chunks (PULL) -> assembler -> policy (deadline cuts) -> packing -> learner ranks (ROUTER)
                               | acknowledgements (control)            ^ weight syncs, checkpoints (control)

    loop         waits for                          unblocked by
    receive      a scored chunk                     a teacher actor
    steps        tokens that a step may take        a chunk; `Version` after a weight update; the end of a part
    acknowledge  time                               the clock
    control      a message of the dispatcher        the dispatcher
    ranks        a rank's hello, the end of a part  the learner

The dispatcher's commands for the learner pass through here, so that every rank sees steps, weight updates and
checkpoints in one order. On cancel: nothing is saved; a restart goes back to the last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import numpy as np

from opd_async.actors.intake.ranks import LearnerRanks
from opd_async.actors.intake.report import LatencyReservoir
from opd_async.actors.intake.taking import StepTaker
from opd_async.actors.intake.unacknowledged import Unacknowledged
from opd_async.config.topology import TrainOn
from opd_async.errors import StorageError
from opd_async.files import storing
from opd_async.plan.chunk_bounds import ChunkBounds
from opd_async.plan.plan import RoleKind
from opd_async.role import ATTEMPT_FLOOR_ENV, Role, role_arguments
from opd_async.run.checkpoints import chosen
from opd_async.run.trained import TrainedRecord
from opd_async.scheduling import frontier
from opd_async.scheduling.assembly import Verdict
from opd_async.transport import messages as m
from opd_async.transport.bounds import MAX_COUNT
from opd_async.transport.channels import Pull
from opd_async.transport.owed import Owed

log = logging.getLogger(__name__)

ACKNOWLEDGE_S = 0.02


class Intake:
    """The one intake of a run."""

    def __init__(self, role: Role) -> None:
        plan = role.plan
        self._role = role
        self._topology = plan.topology
        self._metrics = role.metrics
        self._attempt_floor = 0
        self._unacknowledged = Unacknowledged()
        self._latencies = LatencyReservoir()
        role.refresh = lambda: role.counters.update(self._latencies.quantiles())
        self._door = role.guard()
        self._bounds = ChunkBounds(plan, self._door.keys)
        guard = self._door if plan.guards_chunks else None
        self._pull = Pull(role.context, plan.scored, self._malformed_frame, door=guard)
        self.ranks = LearnerRanks(role.context, plan, self._malformed_frame, self._door)
        self.steps = StepTaker(role, self.ranks, self._unacknowledged)
        self.ranks.on_part_done = self.steps.part_done

    async def restore(self) -> None:
        """Go back to the newest checkpoint, or to nothing, and tell the dispatcher what has been trained."""
        folder = chosen(self._role.plan.run_folder / "checkpoints")
        state = frontier.load(folder) if folder is not None else frontier.empty(0)
        floor = self._attempt_floor = int(os.environ.get(ATTEMPT_FLOOR_ENV, "0"))
        opd = self._topology.opd
        # steps after the checkpoint will be taken again: their rows leave the file
        trained = TrainedRecord(self._role.plan.run_folder, log.warning, state.version, folder)
        contrast = opd.on_engines and self._topology.data.contrast_prompt is not None
        held = frontier.restore(state, floor, opd.wire_topk, teacher=opd.on_engines, contrast=contrast)
        self.steps.begin(held, state.version, trained)
        await self._role.control.send(state)

    async def receive(self) -> None:
        """Take scored chunks in. On cancel: chunks in the socket are lost, and sent again by the rollout actors."""
        while True:
            sender, chunk = await self._pull.receive_from()
            if not isinstance(chunk, m.ScoredChunk):
                self._malformed_frame(f"a {type(chunk).__name__} among scored chunks")
                continue
            if problem := self._unbelievable(sender, chunk):
                self._count(Verdict.MALFORMED, chunk, problem)
                continue
            verdict = self.steps.assembler.add(chunk, self._oldest())
            self._count(verdict, chunk)
            if verdict is Verdict.ACCEPTED or verdict is Verdict.DUPLICATE:
                self._unacknowledged.more_of(chunk.sample_id)
                self.steps.look_again()

    def _unbelievable(self, sender: str | None, chunk: m.ScoredChunk) -> str | None:
        """Why a chunk cannot be; what an earlier launch of the learner left under way may be, and is dropped later."""
        left_over = chunk.attempt < self._attempt_floor
        return self._bounds.of_scored(sender, chunk, newest=MAX_COUNT if left_over else self.steps.steps)

    def _oldest(self) -> int:
        """No token of older weights may be new: every step so far waited for them."""
        schedule = self._topology.schedule
        if schedule.train_on is not TrainOn.TOKENS or schedule.max_staleness is None:
            return 0
        return max(self.steps.steps - schedule.max_staleness - 1, 0)

    def _count(self, verdict: Verdict, chunk: m.ScoredChunk, problem: str = "malformed") -> None:
        if verdict is Verdict.ACCEPTED or verdict is Verdict.EARLY:
            self._role.count("tokens", len(chunk.token_ids))
            self._metrics["opd_intake_scored_tokens_total"].inc(len(chunk.token_ids))
            if chunk.finish is not None:
                self._latencies.add(chunk.latency_s)
        elif verdict is Verdict.MALFORMED:
            self._role.count("malformed_chunks")
            self._metrics["opd_intake_malformed_total"].labels("chunk").inc()
            log.warning("dropped a chunk of sample %d from %s: %s", chunk.sample_id, chunk.teacher_id, problem)
        else:
            self._role.count(f"{verdict.value}_chunks")
            self._metrics["opd_intake_duplicates_total"].inc()

    async def acknowledge(self) -> None:
        """Tell the dispatcher every 20 ms what is held. On cancel: chunks that were not acknowledged come again."""
        while True:
            await asyncio.sleep(ACKNOWLEDGE_S)
            rows = self._unacknowledged.rows(self.steps.assembler)
            if rows is not None:
                await self._role.control.send(self.steps.acks(rows))

    # --- control -----------------------------------------------------------------------------------------------------

    async def control(self) -> None:
        """Handle the dispatcher's messages in order; those for the learner are passed on to every rank."""
        while True:
            message = await self._role.control.receive()
            match message:
                case m.Version():
                    self.steps.assembler.mark(message.version - 1, Owed.listed_in(message))
                    self.steps.opens(message.version)
                case m.Drained():
                    self.steps.assembler.mark(message.version, Owed.listed_in(message))
                    self.steps.look_again()
                case m.Quiesce():
                    await self._role.control.send(m.Quiesced(await self.steps.quiesce()))
                case m.Reclaim():
                    await self._reclaim(message)
                case m.SaveCheckpoint():
                    await self._save(message)
                case m.SyncWeights() | m.ExportModel():
                    await self.ranks.send_all(message)
                case m.Stop():
                    await self.ranks.send_all(message)
                    self._role.stopped.set()
                case _:
                    log.warning("ignored a %s", type(message).__name__)

    async def _save(self, command: m.SaveCheckpoint) -> None:
        """Write the frontier and pass the command on; where there is no room for it, the dispatcher decides."""
        folder = Path(command.folder)
        try:
            with storing(folder):
                frontier.save(frontier.snapshot(self.steps.assembler, command.step), folder)
                self.steps.save(folder)
        except StorageError as error:
            await self._role.control.send(m.NotSaved(command.step, str(error)))
        else:
            await self.ranks.send_all(command)

    async def _reclaim(self, request: m.Reclaim) -> None:
        pairs = zip(request.sample_ids.tolist(), request.attempts.tolist(), strict=True)
        results = [self.steps.assembler.give_up_attempt(sample_id, attempt) for sample_id, attempt in pairs]
        tokens = [one.tokens for one in results]
        await self._role.control.send(
            m.Reclaimed(
                sample_ids=request.sample_ids,
                attempts=np.array([one.attempt for one in results], np.int32),
                ends=np.array([len(prefix) for prefix in tokens], np.int32),
                complete=np.array([one.complete for one in results], np.int32),
                tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
            )
        )
        self.steps.look_again()

    def _malformed_frame(self, reason: str) -> None:
        self._role.count("malformed_frames")
        self._metrics["opd_intake_malformed_total"].labels("frame").inc()

    def close(self) -> None:
        """Close sockets and the log."""
        self._pull.close()
        self.ranks.close()
        self._door.close()
        self.steps.close()


async def main() -> None:
    """Run the intake until the dispatcher says stop."""
    plan, _ = role_arguments("Intake: assemble, take steps, pack.")
    async with Role.open(RoleKind.INTAKE, plan, 0) as role:
        intake = Intake(role)
        try:
            await intake.restore()
            for loop, name in (
                (intake.control(), "control"),
                (intake.ranks.collect(), "ranks"),
                (intake.receive(), "receive"),
                (intake.acknowledge(), "acknowledge"),
                (intake.steps.run(), "steps"),
            ):
                role.spawn(loop, name)
            await role.until_stopped()
        finally:
            intake.close()
