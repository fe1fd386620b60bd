"""The first intake's view of the others, which hold a share of the samples each (`holding.py`).

    Held -> chunks_of -> assembler                what they hold, without tokens
    a part of a step -> TakeShare -> each         what they pack for their ranks
    Reclaim, ShowFrontier -> each -> the answer   what only they know: tokens

An intake sends what it holds and its answers in one order, so that an answer finds everything before it assembled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.intake.ranks import LearnerRanks
from opd_async.actors.intake.steps import Taken
from opd_async.errors import DeadlineError
from opd_async.plan.plan import Plan
from opd_async.scheduling.assembly import Assembler
from opd_async.scheduling.further import FURTHER_IDS
from opd_async.scheduling.held_elsewhere import chunks_of
from opd_async.scheduling.packing import Whole
from opd_async.scheduling.segments import Segment
from opd_async.transport import messages as m
from opd_async.transport.to_intakes import intake_of


class OtherIntakes:
    """All intakes but the first, which owns this."""

    def __init__(self, plan: Plan, ranks: LearnerRanks, held: Callable[[int], None]) -> None:
        """`held` hears of each sample of which more is held, or of which a chunk came again."""
        self.intakes = plan.intakes
        self._teachers, self._scored = tuple(plan.topology.teachers), plan.topology.opd.on_engines
        self._deadline_s = plan.topology.supervisor.heartbeat_deadline_s
        self._ranks = ranks
        self._held = held
        self._answers: dict[str, asyncio.Queue[Any]] = {name: asyncio.Queue() for name in ranks.others}
        self.assembler = Assembler()

    def mine(self, sample_id: int) -> bool:
        """Whether the first intake holds a sample itself."""
        return intake_of(sample_id, self.intakes) == 0

    def heard(self, name: str, message: m.Message) -> None:
        """Take what another intake holds, or its answer."""
        if not isinstance(message, m.Held):
            self._answers[name].put_nowait(message)
            return
        for chunk in chunks_of(message, self._teachers, scored=self._scored):
            self.assembler.put(chunk)
            self._held(chunk.sample_id)
        for sample_id in message.again_ids.tolist():
            self._held(sample_id)

    async def take(
        self, taken: Sequence[Taken], kept: Sequence[Taken], version: int, whole: Whole, *, part: int, last: bool
    ) -> None:
        """Have every other intake send its share of a part to its ranks. On cancel: as `LearnerRanks.send_step`."""
        trained = {one.sample_id for one in kept}
        for index, name in enumerate(self._ranks.others, start=1):
            share = [one for one in taken if intake_of(one.sample_id, self.intakes) == index]
            segments = [one.segment for one in share if one.segment is not None and one.sample_id in trained]
            rewards, advantages = ([getattr(s, field) for s in segments] for field in ("rewards", "advantages"))
            weights = [1.0 if one.segment is None else one.segment.weight or 1.0 for one in share]
            message = m.TakeShare(
                version=version,
                part=part,
                last=last,
                loss_tokens=whole.loss_tokens,
                micro_batches=whole.micro_batches,
                completed_below=self.assembler.completed.first_absent(0),
                further_below=self.assembler.completed.first_absent(FURTHER_IDS),
                taken_ids=np.array([one.sample_id for one in share], np.int64),
                taken_ends=np.array([one.end for one in share], np.int32),
                taken_complete=np.array([one.complete for one in share], np.int32),
                taken_kept=np.array([one.sample_id in trained for one in share], np.int32),
                advantages=_flat(advantages),
                rewards=_flat(rewards),
                segment_weights=np.array(weights, np.float32) if _weighted(segments) else None,
            )
            await self._ranks.send_other(name, message)

    async def reclaim(self, request: m.Reclaim) -> dict[int, NDArray[np.int32]]:
        """End the attempts of samples that others hold; returns the tokens that they hold, by sample.

        Raises `DeadlineError` for an intake that does not answer. On cancel: the answers still come.
        """
        found: dict[int, NDArray[np.int32]] = {}
        of = np.array([intake_of(sample_id, self.intakes) for sample_id in request.sample_ids.tolist()], np.int64)
        asked = [(name, of == index) for index, name in enumerate(self._ranks.others, start=1) if (of == index).any()]
        for name, rows in asked:
            await self._ranks.send_other(name, m.Reclaim(request.sample_ids[rows], request.attempts[rows]))
        for name, _ in asked:
            answer = await self._answer(name, "say what it holds of a dead actor")
            parts = np.split(answer.tokens, np.cumsum(answer.ends)[:-1])
            found |= dict(zip(answer.sample_ids.tolist(), parts, strict=True))
        return found

    async def frontiers(self, step: int) -> list[m.Frontier]:
        """What each other intake holds of samples that are trained in part. Raises and on cancel: as `reclaim`."""
        for name in self._ranks.others:
            await self._ranks.send_other(name, m.ShowFrontier(step))
        return [await self._answer(name, "say what is trained of its samples") for name in self._ranks.others]

    async def _answer(self, name: str, to: str) -> Any:
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._answers[name].get()
        except TimeoutError:
            raise DeadlineError(f"{name} did not {to} in {self._deadline_s:.0f} s; see its log") from None


def _flat(values: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    there = [value for value in values if value is not None]
    assert len(there) in (0, len(values)), "an estimator is for all samples of a step or for none"
    return np.concatenate(there) if there else None


def _weighted(segments: Sequence[Segment]) -> bool:
    return any(segment.weight is not None for segment in segments)
