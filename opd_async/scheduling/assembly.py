"""Scored chunks in any order, with duplicates, to contiguous scored responses.

    ScoredChunk -> Assembler.add -> Sample.scored_end grows -> a policy cuts [trained_end, scored_end)

Pure: no sockets, no clock. A response is trained in order and without gaps, so what was trained of it is one number,
`trained_end`. Marks say which tokens exist without having been scored yet; the staleness bound rests on them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_async.estimators.topk import TopK
from opd_async.scheduling.chunk_checks import well_formed
from opd_async.scheduling.further import is_further
from opd_async.scheduling.held_chunk import HeldChunk
from opd_async.scheduling.intervals import IntervalSet
from opd_async.scheduling.marks import Marks
from opd_async.scheduling.segments import ChunkFacts, Piece, Segment, segment_of
from opd_async.transport.kinds import Finish
from opd_async.transport.messages import ScoredChunk
from opd_async.transport.owed import OwedSample


class Verdict(StrEnum):
    """What became of an arriving chunk."""

    ACCEPTED = "accepted"
    EARLY = "early"
    """Ahead of a gap; kept until the gap is filled."""
    DUPLICATE = "duplicate"
    STALE_ATTEMPT = "stale_attempt"
    """Of an attempt that was given up."""
    ORPHAN = "orphan"
    """Of an unknown sample and without its prompt; the sender will send it again with context."""
    MALFORMED = "malformed"
    """Lengths differ, a logprob is not a finite number <= 0, or what the teacher brought is not what was asked for."""


MAX_EARLY = 256
"""Chunks of one sample that wait for one before them; further ones are dropped, and come again."""


@dataclass(slots=True, kw_only=True)
class Sample:
    """One response on its way through scoring and training; positions count response tokens."""

    sample_id: int
    attempt: int
    actor: int
    prompt_id: int
    label: str
    prompt: NDArray[np.int32]
    teacher_prompt: NDArray[np.int32] | None = None
    """What a teacher in the learner reads in place of it; None: the same."""
    contrast_prompt: NDArray[np.int32] | None = None
    """What it reads beside that; None: nothing."""
    trained: list[NDArray[np.int32]] = field(default_factory=list)
    """Token ids that need no further training: trained ones, and the prefix of a resumed response."""
    untrained: list[Piece] = field(default_factory=list)
    trained_end: int = 0
    scored_end: int = 0
    given: int = 0
    """Tokens that were given and not sampled: no step trains them, they go along as context."""
    untrained_given: int = 0
    """Those of them that no step has taken along yet."""
    finish: str | None = None
    reward: float | None = None
    """Known with `finish`, where the topology has a reward and the response could be judged."""
    turns: tuple[tuple[int, float], ...] = ()
    """Of the reward, what turns have earned: (position after the turn, how much)."""
    teacher: str = ""
    """Who scored it."""
    version: int = 0
    """Of the newest scored token."""
    early: dict[int, ScoredChunk | HeldChunk] = field(default_factory=dict)
    order: int = 0
    """When the response finished, relative to others."""
    episode: int | None = None
    """Of a further sample: the leased one whose episode has begun it."""
    further: tuple[int, ...] = ()
    """Known with `finish`: the further samples that its episode has begun."""

    @property
    def untrained_tokens(self) -> int:
        """Scored tokens that a step has still to train."""
        return self.scored_end - self.trained_end - self.untrained_given

    @property
    def oldest_version(self) -> int:
        """Version of the oldest token that a step has still to train; only defined while there is one."""
        return next(piece.version for piece in self.untrained if piece.sampled)

    def response(self) -> NDArray[np.int32]:
        """int32[scored_end]: all scored response tokens."""
        parts = [*self.trained, *(piece.token_ids for piece in self.untrained)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)


class Resumable(NamedTuple):
    """What is held of a sample whose actor is gone: the next attempt goes on behind `tokens` int32[scored_end]."""

    attempt: int
    tokens: NDArray[np.int32]
    complete: bool
    """The whole response is held, and nothing is to be generated."""


class Assembler:
    """All samples between their first scored chunk and their last trained token.

    `topk` is how many ids the teacher's top-k has on every token, 0 for none; chunks with another number are malformed.
    `teacher` False: no teacher engine scores, and a chunk with a teacher's logprobs is malformed. `contrast` True:
    every token has the teacher's logprob behind another prompt too.
    """

    def __init__(
        self,
        completed: IntervalSet | None = None,
        attempt_floor: int = 0,
        topk: int = 0,
        *,
        teacher: bool = True,
        contrast: bool = False,
    ) -> None:
        self._attempt_floor = attempt_floor
        self._topk = topk
        self._teacher, self._contrast = teacher, contrast
        self.samples: dict[int, Sample] = {}
        self.completed = completed or IntervalSet()
        self._marks = Marks()
        self._finished = 0
        self.on_held: Callable[[Sample, Any], None] = lambda sample, chunk: None
        """Called with each chunk, in order within its sample, that is held from now on."""
        self._further: defaultdict[int, set[int]] = defaultdict(set)
        """The further samples that are here, by episode."""

    def restore(self, sample_id: int, trained: NDArray[np.int32], given: int = 0) -> None:
        """A sample that was partly trained before a restart: its next attempt starts behind these tokens, of which
        `given` were not sampled."""
        sample = Sample(sample_id=sample_id, attempt=0, actor=-1, prompt_id=-1, label="", prompt=np.zeros(0, np.int32))
        sample.trained, sample.given = [trained], given
        sample.trained_end = sample.scored_end = len(trained)
        self.samples[sample_id] = sample

    def add(self, chunk: ScoredChunk, oldest: int = 0) -> Verdict:
        """Take one scored chunk; whatever the verdict, the state stays consistent.

        New tokens of weights before `oldest`, or before those of the sample's earlier tokens, cannot be: malformed.
        """
        if not well_formed(chunk, self._topk, self._teacher, self._contrast):
            return Verdict.MALFORMED
        return self.put(chunk, oldest)

    def put(self, chunk: ScoredChunk | HeldChunk, oldest: int = 0) -> Verdict:
        """The same for a chunk of which somebody has seen that it is well formed."""
        if chunk.sample_id in self.completed:
            return Verdict.DUPLICATE
        if chunk.attempt < self._attempt_floor:
            return Verdict.STALE_ATTEMPT
        sample = self.samples.get(chunk.sample_id)
        if sample is None:
            if chunk.context is None or chunk.start != 0:
                return Verdict.ORPHAN
            sample = Sample(
                sample_id=chunk.sample_id,
                attempt=chunk.attempt,
                actor=chunk.actor,
                prompt_id=chunk.prompt_id,
                label=chunk.label,
                prompt=chunk.context,
                teacher_prompt=chunk.teacher_prompt,
                contrast_prompt=chunk.contrast_prompt,
                episode=chunk.episode,
            )
            self.samples[chunk.sample_id] = sample
            if chunk.episode is not None:
                self._further[chunk.episode].add(chunk.sample_id)
        if chunk.attempt < sample.attempt:
            return Verdict.STALE_ATTEMPT
        is_first_of_attempt = chunk.attempt > sample.attempt or not len(sample.prompt)
        if is_first_of_attempt and not self._next_attempt(sample, chunk):
            return Verdict.ORPHAN
        if chunk.start < sample.scored_end or sample.finish is not None or chunk.start in sample.early:
            return Verdict.DUPLICATE
        if len(chunk.token_ids) and chunk.sampled and chunk.weight_version < max(sample.version, oldest):
            return Verdict.MALFORMED
        if chunk.start > sample.scored_end:
            if len(sample.early) >= MAX_EARLY:
                return Verdict.ORPHAN
            sample.early[chunk.start] = chunk
            return Verdict.EARLY
        self._append(sample, chunk)
        while sample.finish is None and (following := sample.early.pop(sample.scored_end, None)) is not None:
            if len(following.token_ids) and following.sampled and following.weight_version < sample.version:
                break
            self._append(sample, following)
        return Verdict.ACCEPTED

    def _next_attempt(self, sample: Sample, chunk: ScoredChunk | HeldChunk) -> bool:
        """The first chunk of a later attempt: it must bring the prompt and continue what is held."""
        if chunk.context is None or chunk.start != sample.scored_end:
            return False
        sample.attempt, sample.actor = chunk.attempt, chunk.actor
        sample.prompt_id, sample.label = chunk.prompt_id, chunk.label
        sample.prompt = chunk.context[: chunk.prompt_tokens]
        sample.teacher_prompt, sample.contrast_prompt = chunk.teacher_prompt, chunk.contrast_prompt
        sample.early.clear()
        return True

    def _append(self, sample: Sample, chunk: ScoredChunk | HeldChunk) -> None:
        self.on_held(sample, chunk)
        if len(chunk.token_ids):
            topk = TopK.of(chunk.topk_ids, chunk.topk_logprobs)
            piece = Piece(
                version=chunk.weight_version,
                token_ids=chunk.token_ids,
                behaviour_logprobs=chunk.behaviour_logprobs,
                teacher_logprobs=chunk.teacher_logprobs,
                topk=topk,
                contrast_logprobs=chunk.contrast_logprobs,
                facts=ChunkFacts(chunk.end, chunk.weight_version, chunk.made_at, chunk.latency_s, chunk.scored_version),
                sampled=chunk.sampled,
            )
            sample.untrained.append(piece)
            sample.scored_end = chunk.end
            if chunk.sampled:
                sample.version = chunk.weight_version
            else:
                sample.given += len(chunk.token_ids)
                sample.untrained_given += len(chunk.token_ids)
        sample.actor, sample.teacher = chunk.actor, chunk.teacher
        if chunk.finish is not None:
            sample.reward = chunk.reward
            if chunk.turn_ends is not None and chunk.turn_rewards is not None:
                sample.turns = tuple(zip(chunk.turn_ends.tolist(), chunk.turn_rewards.tolist(), strict=True))
            sample.further = () if chunk.further is None else tuple(chunk.further.tolist())
            self._finish(sample, chunk.finish)

    def _finish(self, sample: Sample, finish: str) -> None:
        sample.finish, sample.order = finish, self._finished
        self._finished += 1

    def episode_of(self, sample_id: int) -> list[Sample] | None:
        """A leased sample that has ended and the further ones of its episode, which have ended too; None before."""
        first = self.samples.get(sample_id)
        if first is None or first.finish is None:
            return None
        here = self._further.get(sample_id, set())
        if any(one not in here and one not in self.completed for one in first.further):
            return None
        found = [first, *(self.samples[one] for one in sorted(here))]
        return found if all(sample.finish is not None for sample in found) else None

    def _end_here(self, sample_id: int, attempt: int) -> Resumable:
        """A further sample whose actor is gone ends with what is held of it: nobody goes on with it."""
        sample = self.samples.get(sample_id)
        if sample is None:
            self.completed.add(sample_id)
        elif sample.finish is None:
            sample.attempt = attempt + 1
            sample.early.clear()
            self._finish(sample, Finish.FAILED)
        return Resumable(attempt, np.zeros(0, np.int32), complete=True)

    def give_up_attempt(self, sample_id: int, attempt: int) -> Resumable:
        """End an attempt whose actor is gone: late chunks of it are refused from now on. Idempotent."""
        if sample_id in self.completed:
            return Resumable(attempt, np.zeros(0, np.int32), complete=True)
        if is_further(sample_id):
            return self._end_here(sample_id, attempt)
        sample = self.samples.get(sample_id)
        if sample is None:
            # remembered, so that a chunk still under way cannot bring the old attempt back to life
            sample = Sample(
                sample_id=sample_id, attempt=attempt, actor=-1, prompt_id=-1, label="", prompt=np.zeros(0, np.int32)
            )
            self.samples[sample_id] = sample
        if sample.finish is not None:
            return Resumable(sample.attempt, np.zeros(0, np.int32), complete=True)
        if attempt >= sample.attempt:  # a second request for the same attempt must not end the one that followed it
            sample.attempt = attempt + 1
            sample.early.clear()
        return Resumable(sample.attempt, sample.response(), complete=False)

    def mark(self, version: int, owed: Iterable[OwedSample]) -> None:
        """Learn which tokens of weights `version` or older may still be on their way; all others are held."""
        self._marks.add(version, owed, self._holds)

    def settled(self, version: int) -> bool:
        """Whether every token made by weights `version` or older is here. True before the first mark is due."""
        return self._marks.settled(version, self._holds)

    def start_at(self, version: int) -> None:
        """Begin training at `version`: no token of older weights exists."""
        self._marks.start_at(version)

    def owed(self) -> list[OwedSample]:
        """What the oldest mark still waits for."""
        return self._marks.owed()

    def _holds(self, one: OwedSample) -> bool:
        if one.sample_id in self.completed:
            return True
        sample = self.samples.get(one.sample_id)
        if sample is None:
            return one.end == 0
        return sample.attempt > one.attempt or sample.scored_end >= one.end

    def take(self, sample: Sample) -> Segment | None:
        """Cut everything untrained off `sample` for a step; None when no token of it is to be trained (an empty
        response, or given tokens alone)."""
        return self.take_to(sample, sample.scored_end, complete=sample.finish is not None)

    def take_to(self, sample: Sample, end: int, *, complete: bool) -> Segment | None:
        """The same of what is untrained before `end`, which is the end of a chunk; `complete`: nothing is behind it."""
        at, count = sample.trained_end, 0
        while count < len(sample.untrained) and at < end:
            at += len(sample.untrained[count].token_ids)
            count += 1
        assert at <= end, f"sample {sample.sample_id}: {end} is in the middle of a chunk"
        pieces, rest = sample.untrained[:count], sample.untrained[count:]
        segment = _segment(sample, pieces, end, complete) if any(piece.sampled for piece in pieces) else None
        sample.trained.extend(piece.token_ids for piece in pieces)
        sample.untrained = rest
        sample.trained_end = end
        sample.untrained_given = sum(len(piece.token_ids) for piece in rest if not piece.sampled)
        if complete:
            self._leave(sample)
        return segment

    def _leave(self, sample: Sample) -> None:
        """All of a sample is trained."""
        del self.samples[sample.sample_id]
        self.completed.add(sample.sample_id)
        if sample.episode is not None:
            self._further[sample.episode].discard(sample.sample_id)
            if not self._further[sample.episode]:
                del self._further[sample.episode]


def _segment(sample: Sample, pieces: list[Piece], end: int, complete: bool) -> Segment:
    return segment_of(
        pieces,
        sample_id=sample.sample_id,
        prompt=sample.prompt,
        trained=sample.trained,
        start=sample.trained_end,
        end=end,
        complete=complete,
        teacher=sample.teacher,
        teacher_prompt=sample.teacher_prompt,
        contrast_prompt=sample.contrast_prompt,
    )
