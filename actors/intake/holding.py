"""An intake that is not the first: it holds its share of the samples, and packs what the first one takes of them.

    scored chunks (PULL) -> assembler -> packing -> its learner ranks (ROUTER)
                               | Held          ^ TakeShare, and the commands for the ranks
                               +-> first intake

    loop         waits for                   unblocked by
    receive      a scored chunk              a teacher actor
    tell         chunks that are held        `receive`
    obey         the first intake            a step, a weight update, a checkpoint, the death of a rollout actor
    listen       the dispatcher              which only says at the end that it stops; so does the first intake
    ranks        a rank's hello              the learner

It decides nothing: samples, steps, marks and acknowledgements are the first intake's. On cancel: nothing is saved; the
learner and all intakes go back to the last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np

from opd_async.actors.intake.arriving import Arriving, attempt_floor
from opd_async.actors.intake.open_step import segments_of
from opd_async.actors.intake.ranks import LearnerRanks
from opd_async.actors.intake.shown import ShownSamples, shown_by
from opd_async.actors.intake.steps import Taken, pack, taken_of
from opd_async.errors import RoleError
from opd_async.keys import incarnation
from opd_async.role import Role
from opd_async.run.checkpoints import chosen
from opd_async.scheduling import frontier
from opd_async.scheduling.assembly import Assembler, Verdict
from opd_async.scheduling.further import FURTHER_IDS
from opd_async.scheduling.held_elsewhere import HeldNews
from opd_async.scheduling.packing import Whole
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlClient
from opd_async.transport.to_intakes import intake_of

log = logging.getLogger(__name__)

TELL_S = 0.02
"""What is held is told so long after the first of it came: one message for many chunks."""


class HoldingIntake:
    """The intake `index`, not 0, of a run."""

    def __init__(self, role: Role) -> None:
        plan = role.plan
        self._role, self._topology = role, plan.topology
        self._index, self._intakes = role.mine.index, plan.intakes
        self._door = role.guard()
        self._arriving = Arriving(role, self._door, self._malformed_frame)
        self.ranks = LearnerRanks(role.context, plan, self._malformed_frame, self._door, self._index)
        self._first = ControlClient(role.context, plan.batches[0], role.name, passport=role.passport)
        self._news = HeldNews(tuple(plan.topology.teachers))
        self._there = asyncio.Event()
        self._shown = ShownSamples(shown_by(plan.topology.telemetry.samples_per_step, self._index, self._intakes))
        self._taken: list[Taken] = []
        self._kept: list[Taken] = []
        self.steps = 0
        """Optimizer steps taken so far."""
        self.assembler = Assembler()

    async def restore(self) -> None:
        """Go back to the newest checkpoint, or to nothing, and tell the first intake that this one is there."""
        folder = chosen(self._role.plan.run_folder / "checkpoints")
        state = frontier.load(folder) if folder is not None else frontier.empty(0)
        mine = frontier.share(state, lambda sample_id: intake_of(sample_id, self._intakes) == self._index)
        opd, data = self._topology.opd, self._topology.data
        contrast = opd.on_engines and data.contrast_prompt is not None
        self.assembler = frontier.restore(
            mine, attempt_floor(), opd.wire_topk, teacher=opd.on_engines, contrast=contrast
        )
        self.assembler.on_held = self._news.held
        self.steps = state.version
        await self._first.send(m.Hello(self._role.name, incarnation()))

    async def receive(self) -> None:
        """As `Arriving.receive`."""
        await self._arriving.receive(lambda: self.assembler, lambda: self.steps, self._held)

    def _held(self, sample_id: int, verdict: Verdict) -> None:
        if verdict is Verdict.DUPLICATE:
            self._news.again(sample_id)
        self._there.set()

    async def tell(self) -> None:
        """Tell the first intake what is held. On cancel: it does not know all of it."""
        while True:
            await self._there.wait()
            await asyncio.sleep(TELL_S)
            self._there.clear()
            await self._tell_now()

    async def _tell_now(self) -> None:
        if len(self._news):
            await self._first.send(self._news.message())

    async def listen(self) -> None:
        """Read what the dispatcher says to all intakes; the first one passes on what matters. On cancel: nothing."""
        while True:
            message = await self._role.control.receive()
            if not isinstance(message, m.Stop):
                log.warning("ignored a %s", type(message).__name__)

    async def obey(self) -> None:
        """Do what the first intake says, in order. On cancel: as `LearnerRanks.send_step`."""
        while True:
            message = await self._first.receive()
            match message:
                case m.TakeShare():
                    await self._take(message)
                case m.EndAttempts():
                    await self._end_attempts(message)
                case m.ShowTrained():
                    known = frontier.snapshot(self.assembler, self.steps)
                    ids, ends, tokens = known.partial_ids, known.partial_ends, known.partial_tokens
                    await self._first.send(m.Prefixes(message.request, ids, ends, tokens))
                case m.SyncWeights() | m.ExportModel() | m.SaveCheckpoint() | m.AskTeacher():
                    await self.ranks.send_all(message)
                case m.Stop():
                    await self.ranks.send_all(message)
                    self._role.stopped.set()
                case _:
                    log.warning("ignored a %s", type(message).__name__)

    async def _take(self, share: m.TakeShare) -> None:
        """Send this intake's share of a part of a step to its ranks."""
        taken = [
            self._taken_of(sample_id, end, bool(complete))
            for sample_id, end, complete in zip(
                share.taken_ids.tolist(), share.taken_ends.tolist(), share.taken_complete.tolist(), strict=True
            )
        ]
        kept = [one for one, is_kept in zip(taken, share.taken_kept.tolist(), strict=True) if is_kept]
        _equip(taken, kept, share)
        self._taken += taken
        self._kept += kept
        if share.last:
            self.steps = share.version + 1
        self.assembler.completed.fill(0, share.completed_below)
        self.assembler.completed.fill(FURTHER_IDS, share.further_below)
        whole = Whole(share.loss_tokens, share.micro_batches)
        options: dict[str, Any] = {"part": share.part, "last": share.last, "intakes": self._intakes, "whole": whole}
        # in a thread: a step of a million tokens would hold up everything that arrives meanwhile
        batches = await asyncio.to_thread(pack, segments_of(kept), share.version, self._topology.learner, **options)
        await self.ranks.send_step(batches)
        if share.last:
            for one in self._shown.of_step(self._kept, self._taken, share.version):
                await self._role.control.send(one)
            self._taken, self._kept = [], []

    def _taken_of(self, sample_id: int, end: int, complete: bool) -> Taken:
        sample = self.assembler.samples.get(sample_id)
        if sample is None or not sample.trained_end <= end <= sample.scored_end:
            name = self._role.name
            raise RoleError(f"the first intake takes sample {sample_id} up to {end}, which {name} does not hold")
        return taken_of(self.assembler, sample, end, complete=complete)

    async def _end_attempts(self, question: m.EndAttempts) -> None:
        pairs = zip(question.sample_ids.tolist(), question.attempts.tolist(), strict=True)
        tokens = [self.assembler.give_up_attempt(sample_id, attempt).tokens for sample_id, attempt in pairs]
        await self._tell_now()  # everything that is held now comes before the answer
        ends = np.array([len(prefix) for prefix in tokens], np.int32)
        flat = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
        await self._first.send(m.Prefixes(question.request, question.sample_ids, ends, flat))

    def _malformed_frame(self, reason: str) -> None:
        self._role.count("malformed_frames")
        self._role.metrics["opd_intake_malformed_total"].labels("frame").inc()

    def start(self) -> None:
        """Start the loops under the role's task group."""
        loops = {"listen": self.listen, "ranks": self.ranks.collect, "receive": self.receive}
        for name, loop in (loops | {"tell": self.tell, "obey": self.obey}).items():
            self._role.spawn(loop(), name)

    def close(self) -> None:
        """Close sockets."""
        self._arriving.close()
        self.ranks.close()
        self._first.close()
        self._door.close()


def _equip(taken: list[Taken], kept: list[Taken], share: m.TakeShare) -> None:
    """Give segments what the first intake has made of their rewards."""
    segments = segments_of(kept)
    cuts = np.cumsum([segment.tokens for segment in segments])[:-1]
    for field, values in (("advantages", share.advantages), ("rewards", share.rewards)):
        if values is not None:
            for segment, own in zip(segments, np.split(values, cuts), strict=True):
                setattr(segment, field, own)
    if share.segment_weights is not None:
        for one, weight in zip(taken, share.segment_weights.tolist(), strict=True):
            if one.segment is not None:
                one.segment.weight = weight
