"""Assemble scored chunks, take steps, and feed the learner's ranks.

    scored chunks (PULL) -> assembler -> policy (deadline cuts) -> packing -> learner ranks (ROUTER)
                               | acknowledgements (control)            ^ weight syncs, checkpoints (control)

    loop         waits for                          unblocked by
    receive      a scored chunk                     a teacher actor
    steps        tokens that a step may take        a chunk; `Version` after a weight update; the end of a part
    acknowledge  time                               the clock
    control      a message of the dispatcher        the dispatcher
    ranks        a rank's hello, the end of a part  the learner
                 what other intakes hold            they (`others.py`, `holding.py`)

The dispatcher's commands for the learner pass through here, so that every rank sees steps, weight updates and
checkpoints in one order. On cancel: nothing is saved; a restart goes back to the last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import numpy as np

from opd_async.actors.intake.arriving import Arriving, attempt_floor
from opd_async.actors.intake.holding import HoldingIntake
from opd_async.actors.intake.others import OtherIntakes
from opd_async.actors.intake.ranks import LearnerRanks
from opd_async.actors.intake.taking import StepTaker
from opd_async.actors.intake.unacknowledged import Unacknowledged
from opd_async.errors import RoleError, StorageError
from opd_async.files import storing
from opd_async.plan.plan import Plan, RoleKind
from opd_async.role import Role, role_arguments
from opd_async.run.checkpoints import chosen
from opd_async.run.trained import TrainedRecord
from opd_async.scheduling import frontier
from opd_async.transport import messages as m
from opd_async.transport.owed import Owed

log = logging.getLogger(__name__)

ACKNOWLEDGE_S = 0.02


class Intake:
    """The first intake of a run, which decides; where there are several it holds a share of the samples."""

    def __init__(self, role: Role) -> None:
        plan = role.plan
        self._role = role
        self._topology = plan.topology
        self._metrics = role.metrics
        self._unacknowledged = Unacknowledged()
        self._door = role.guard()
        self._arriving = Arriving(role, self._door, self._malformed_frame)
        self.ranks = LearnerRanks(role.context, plan, self._malformed_frame, self._door)
        late = self._metrics["opd_intake_late_answers_total"]
        self._others = OtherIntakes(plan, self.ranks, self._held, late.inc, self._malformed_frame)
        self.steps = StepTaker(role, self.ranks, self._unacknowledged, self._others)
        self.ranks.on_part_done = self.steps.part_done
        self.ranks.on_other = self._others.heard

    async def restore(self) -> None:
        """Go back to the newest checkpoint, or to nothing, and tell the dispatcher what has been trained."""
        folder = chosen(self._role.plan.run_folder / "checkpoints")
        state = frontier.load(folder) if folder is not None else frontier.empty(0)
        opd = self._topology.opd
        # steps after the checkpoint will be taken again: their rows leave the file
        trained = TrainedRecord(self._role.plan.run_folder, log.warning, state.version, folder)
        contrast = opd.on_engines and self._topology.data.contrast_prompt is not None
        held = frontier.restore(state, attempt_floor(), opd.wire_topk, teacher=opd.on_engines, contrast=contrast)
        self.steps.begin(held, state.version, trained)
        await self._role.control.send(state)

    async def receive(self) -> None:
        """As `Arriving.receive`."""
        await self._arriving.receive(
            lambda: self.steps.assembler, lambda: self.steps.steps, lambda sample_id, verdict: self._held(sample_id)
        )

    def _held(self, sample_id: int) -> None:
        """More of a sample is held, here or by another intake, or a chunk of it came again."""
        self._unacknowledged.more_of(sample_id)
        self.steps.look_again()

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
                case m.SyncWeights() | m.ExportModel() | m.AskTeacher():
                    await self.ranks.send_all(message)
                case m.Stop():
                    await self.ranks.send_all(message)
                    self._role.stopped.set()
                case _:
                    log.warning("ignored a %s", type(message).__name__)

    async def _save(self, command: m.SaveCheckpoint) -> None:
        """Write the frontier and pass the command on; where there is no room for it, the dispatcher decides."""
        folder, state = Path(command.folder), await self._frontier(command.step)
        try:
            with storing(folder):
                frontier.save(state, folder)
                self.steps.save(folder)
        except StorageError as error:
            await self._role.control.send(m.NotSaved(command.step, str(error)))
        else:
            await self.ranks.send_all(command)

    async def _frontier(self, step: int) -> m.Frontier:
        """What is trained after `step`; the tokens of samples that others hold are theirs to say."""
        elsewhere = await self._others.trained()
        known = frontier.snapshot(self.steps.assembler, step)
        try:
            return frontier.joined(known, elsewhere, self._others.mine)
        except ValueError as error:
            raise RoleError(f"the intakes do not agree: {error}; go on with --resume, and please report it") from None

    async def _reclaim(self, request: m.Reclaim) -> None:
        elsewhere = await self._others.reclaim(request)
        pairs = list(zip(request.sample_ids.tolist(), request.attempts.tolist(), strict=True))
        results = [self.steps.assembler.give_up_attempt(sample_id, attempt) for sample_id, attempt in pairs]
        tokens = [elsewhere.get(one, result.tokens) for (one, _), result in zip(pairs, results, strict=True)]
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
        self._arriving.close()
        self.ranks.close()
        self._door.close()
        self.steps.close()


async def hold(plan: Plan, index: int) -> None:
    """Run another intake than the first until that one says stop. On cancel: as `HoldingIntake`."""
    async with Role.open(RoleKind.INTAKE, plan, index) as role:
        intake = HoldingIntake(role)
        try:
            await intake.restore()
            intake.start()
            await role.until_stopped()
        finally:
            intake.close()


async def main() -> None:
    """Run the intake until the dispatcher says stop."""
    plan, index = role_arguments("Intake: assemble, take steps, pack.")
    if index:
        await hold(plan, index)
        return
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
