"""The first intake's view of the others, which hold a share of the samples each (`holding.py`).

    Held -> chunks_of -> assembler                what they hold, without tokens
    a part of a step -> TakeShare -> each         what they pack for their ranks
    EndAttempts, ShowTrained -> each -> Prefixes  what only they know: tokens

An intake sends what it holds and its answers in one order, so that an answer finds everything before it assembled.
Questions have numbers: the answer to one that nobody waits for any more is dropped, and counted.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.intake.ranks import LearnerRanks
from opd_async.actors.intake.steps import Taken
from opd_async.errors import DeadlineError, RoleError
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

    def __init__(
        self,
        plan: Plan,
        ranks: LearnerRanks,
        held: Callable[[int], None],
        late: Callable[[], None],
        malformed: Callable[[str], None],
    ) -> None:
        """`held` hears of each sample of which more is held, or of which a chunk came again; `late` of each answer that
        nobody waits for any more; `malformed`, why, of each message that is dropped because it cannot be."""
        self.intakes = plan.intakes
        self._teachers, self._scored = tuple(plan.topology.teachers), plan.topology.opd.on_engines
        self._deadline_s = plan.topology.supervisor.heartbeat_deadline_s
        self._ranks = ranks
        self._held, self._late, self._malformed = held, late, malformed
        self._numbers = itertools.count(1)
        self._asked = 0
        """The number of the last question."""
        self._open: dict[int, tuple[str, asyncio.Future[m.Prefixes]]] = {}
        """Whom each question asks that somebody waits for: no more of them than there are other intakes."""
        self.assembler = Assembler()

    def mine(self, sample_id: int) -> bool:
        """Whether the first intake holds a sample itself."""
        return intake_of(sample_id, self.intakes) == 0

    def heard(self, name: str, message: m.Message) -> None:
        """Take what another intake holds, or its answer."""
        match message:
            case m.Held():
                for chunk in chunks_of(message, self._teachers, scored=self._scored):
                    self.assembler.put(chunk)
                    self._held(chunk.sample_id)
                for sample_id in message.again_ids.tolist():
                    self._held(sample_id)
            case m.Prefixes():
                self._answered(name, message)
            case _:
                self._malformed(f"a {type(message).__name__} of {name}, which another intake never sends")

    def _answered(self, name: str, answer: m.Prefixes) -> None:
        asked, future = self._open.get(answer.request, (None, None))
        if (future is None and 0 < answer.request <= self._asked) or (future is not None and future.done()):
            self._late()
        elif future is None or asked != name:
            self._malformed(f"an answer of {name} to question {answer.request}, which it was not asked")
        else:
            future.set_result(answer)

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

        Raises `DeadlineError` for an intake that does not answer, `RoleError` for one that answers of other samples.
        On cancel: the attempts may have ended; answers that still come are dropped.
        """
        of = np.array([intake_of(sample_id, self.intakes) for sample_id in request.sample_ids.tolist()], np.int64)
        questions = {
            name: m.EndAttempts(next(self._numbers), request.sample_ids[of == index], request.attempts[of == index])
            for index, name in enumerate(self._ranks.others, start=1)
            if (of == index).any()
        }
        found = await self._ask(questions, "say what it holds of a dead actor")
        if found.keys() != (wanted := set(request.sample_ids[of > 0].tolist())):
            wrong = min(found.keys() ^ wanted)
            raise RoleError(f"the intakes do not agree who holds sample {wrong}; go on with --resume, and report it")
        return found

    async def trained(self) -> dict[int, NDArray[np.int32]]:
        """What is trained of the samples that others hold and that are trained in part, by sample.

        Raises `DeadlineError` for an intake that does not answer. On cancel: as `reclaim`.
        """
        questions = {name: m.ShowTrained(next(self._numbers)) for name in self._ranks.others}
        return await self._ask(questions, "say what is trained of its samples")

    async def _ask(
        self, questions: Mapping[str, m.EndAttempts | m.ShowTrained], to: str
    ) -> dict[int, NDArray[np.int32]]:
        """The answers of those who are asked, joined; all are asked before one is waited for."""
        found: dict[int, NDArray[np.int32]] = {}
        future: asyncio.Future[m.Prefixes]
        try:
            for name, question in questions.items():
                future = asyncio.get_running_loop().create_future()
                self._open[question.request], self._asked = (name, future), question.request
                await self._ranks.send_other(name, question)
            for question in questions.values():
                name, future = self._open[question.request]
                async with asyncio.timeout(self._deadline_s):
                    answer = await future
                parts = np.split(answer.tokens, np.cumsum(answer.ends)[:-1])
                found |= dict(zip(answer.sample_ids.tolist(), parts, strict=False))  # nothing is one piece
        except TimeoutError:
            raise DeadlineError(f"{name} did not {to} in {self._deadline_s:.0f} s; see its log") from None
        finally:
            for question in questions.values():
                self._open.pop(question.request, None)
        return found


def _flat(values: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    there = [value for value in values if value is not None]
    assert len(there) in (0, len(values)), "an estimator is for all samples of a step or for none"
    return np.concatenate(there) if there else None


def _weighted(segments: Sequence[Segment]) -> bool:
    return any(segment.weight is not None for segment in segments)
