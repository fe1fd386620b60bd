"""Choose a few responses of each step for people to read, and put their parts together.

    Taken (a step's samples) -> ShownSamples -> TrainedSample -> the dispatcher -> samples.jsonl

A response that is cut is trained in parts, and the intake forgets the scores of a part with its step. So a few cut
responses are followed from their first part on. Memory is bounded: `FOLLOWED` responses for each that is shown, and the
first `SHOWN_TOKENS` tokens of each.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.intake.steps import Taken
from opd_async.scheduling.segments import ChunkFacts, Segment
from opd_async.transport import messages as m
from opd_async.transport.bounds import LONGEST_S

SHOWN_TOKENS = 8192
"""Of a longer response only so many tokens are recorded; of a longer prompt the last so many."""
SANE_S = (-LONGEST_S, LONGEST_S)
FOLLOWED = 8
"""Cut responses that are followed, for each response of a step that is shown."""


def shown_by(per_step: int, index: int, intakes: int) -> int:
    """How many responses of each step the intake `index` shows, of so many for all."""
    return per_step // intakes + (index < per_step % intakes)


@dataclass(slots=True, kw_only=True)
class _Parts:
    """The parts of one response so far; arrays hold at most `SHOWN_TOKENS` tokens together."""

    prompt: NDArray[np.int32]
    prompt_tokens: int
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    behaviour: list[NDArray[np.float32]] = field(default_factory=list)
    teacher: list[NDArray[np.float32]] = field(default_factory=list)
    chunks: list[ChunkFacts] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    given: list[tuple[int, int]] = field(default_factory=list)
    scorer: str = ""

    def add(self, segment: Segment, version: int) -> None:
        """Append the part that the step from weights `version` took."""
        room = max(SHOWN_TOKENS - segment.start, 0)
        fresh = segment.token_ids[segment.prompt_tokens + segment.start :][:room]
        self.tokens.append(fresh.copy())
        self.behaviour.append(_by_position(segment, segment.behaviour_logprobs)[:room].copy())
        self.teacher.append(_by_position(segment, segment.teacher_logprobs)[:room].copy())
        self.given += [(start, min(end, SHOWN_TOKENS)) for start, end in segment.given_runs() if start < SHOWN_TOKENS]
        self.chunks += segment.chunks[: SHOWN_TOKENS - len(self.chunks)]
        self.ends.append(segment.end)
        self.versions.append(version)
        self.scorer = segment.teacher

    def message(self, taken: Taken, version: int) -> m.TrainedSample:
        """The whole response, which `taken` has ended."""
        began = self.chunks[0].made_at if self.chunks else 0.0
        return m.TrainedSample(
            version=version,
            sample_id=taken.sample_id,
            prompt_id=max(taken.prompt_id, 0),
            prompt_tokens=self.prompt_tokens,
            response_tokens=taken.end,
            finish=taken.finish or m.Finish.STOP,
            reward=taken.reward,
            teacher=self.scorer,
            prompt=self.prompt,
            response=np.concatenate(self.tokens),
            behaviour_logprobs=np.concatenate(self.behaviour),
            teacher_logprobs=np.concatenate(self.teacher),
            made_at=began,
            chunk_ends=np.array([chunk.end for chunk in self.chunks], np.int32),
            chunk_versions=np.array([chunk.version for chunk in self.chunks], np.int32),
            chunk_made_s=np.array([chunk.made_at - began for chunk in self.chunks], np.float32).clip(
                -LONGEST_S, LONGEST_S
            ),
            chunk_latency_s=np.array([chunk.latency_s for chunk in self.chunks], np.float32),
            chunk_scored=self._scored(),
            part_ends=np.array(self.ends, np.int32),
            part_versions=np.array(self.versions, np.int32),
            given_starts=np.array([start for start, _ in self.given], np.int32) if self.given else None,
            given_ends=np.array([end for _, end in self.given], np.int32) if self.given else None,
            episode=taken.episode,
            turn_ends=np.array([end for end, _ in taken.turns], np.int32) if taken.turns else None,
            turn_rewards=np.array([reward for _, reward in taken.turns], np.float32) if taken.turns else None,
        )

    def _scored(self) -> NDArray[np.int32] | None:
        """The weights that scored each chunk; None where no engines of the student's do."""
        if all(chunk.scored_version is None for chunk in self.chunks):
            return None
        scored = [chunk.version if chunk.scored_version is None else chunk.scored_version for chunk in self.chunks]
        return np.array(scored, np.int32)


class ShownSamples:
    """The responses that are followed, and the choice among those that have ended."""

    def __init__(self, per_step: int) -> None:
        self._per_step = per_step
        self._followed: dict[int, _Parts] = {}

    def of_step(self, trained: Sequence[Taken], taken: Sequence[Taken], version: int) -> list[m.TrainedSample]:
        """Choose at most `per_step` responses that the step from weights `version` has `trained` to their end.

        `taken` has all samples of the step, those that a filter has kept from being trained included: they are followed
        no longer. A response that was cut before it was followed cannot be chosen.
        """
        if not self._per_step:
            return []
        ended: list[tuple[Taken, _Parts | None]] = []
        begun: list[Taken] = []
        for one in trained:
            parts = self._followed.get(one.sample_id)
            if parts is not None and one.segment is not None:
                parts.add(one.segment, version)
            whole = parts is None and one.segment is not None and one.segment.start == 0
            if one.complete and (whole or parts is not None):
                ended.append((one, self._followed.pop(one.sample_id, None)))
            elif whole:
                begun.append(one)
        for one in taken:
            if one.complete:
                self._followed.pop(one.sample_id, None)
        choose = random.Random(version)
        for one in choose.sample(begun, min(len(begun), FOLLOWED * self._per_step - len(self._followed))):
            self._followed[one.sample_id] = _parts(one, version)
        chosen = choose.sample(ended, min(len(ended), self._per_step))
        return [(parts or _parts(one, version)).message(one, version) for one, parts in chosen]


def _by_position(segment: Segment, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32[end - start], zero where a token was given, of one value for each trained token; or no value at all."""
    if segment.positions is None or not len(values):
        return values
    whole = np.zeros(segment.end - segment.start, np.float32)
    whole[segment.positions - segment.start] = values
    return whole


def _parts(taken: Taken, version: int) -> _Parts:
    """The first part of a response."""
    segment = taken.segment
    assert segment is not None
    prompt = segment.token_ids[: segment.prompt_tokens]
    parts = _Parts(prompt=prompt[-SHOWN_TOKENS:].copy(), prompt_tokens=segment.prompt_tokens)
    parts.add(segment, version)
    return parts
