"""What a step takes of a response: its scored tokens in one piece, sampled ones to train and given ones as context.

Piece (scored tokens of one weight version, or given ones) -> segment_of -> Segment -> packing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_async.estimators.topk import TopK, join


class ChunkFacts(NamedTuple):
    """What is remembered of a chunk beside its tokens."""

    end: int
    """Position after its last token."""
    version: int
    """Weights that made it."""
    made_at: float
    """When its last token arrived at the rollout actor, in `time.time()`."""
    latency_s: float
    """From then to its score."""
    scored_version: int | None = None
    """The student's weights that scored it, where its own engines do."""


@dataclass(slots=True, kw_only=True)
class Piece:
    """Scored tokens of one weight version. float32[n] each; `token_ids` int32[n]; `topk` n rows or None.

    Where no teacher engine scores, `teacher_logprobs` is empty, here and in all that is made of it. `contrast_logprobs`
    is None where there is no contrast. A piece that is not `sampled` was given: its tokens have no logprobs and no age.
    """

    version: int
    token_ids: NDArray[np.int32]
    behaviour_logprobs: NDArray[np.float32]
    teacher_logprobs: NDArray[np.float32]
    topk: TopK | None = None
    contrast_logprobs: NDArray[np.float32] | None = None
    facts: ChunkFacts | None = None
    sampled: bool = True


@dataclass(slots=True, kw_only=True)
class Segment:
    """What a step takes of one sample: response positions [start, end), with everything before as context.

    `token_ids` int32[prompt + end]; `positions` int32[n] are those that are trained, all but given ones (None: all,
    n = end - start). Per trained token: `behaviour_logprobs`, `teacher_logprobs` float32[n], `versions` int32[n] of the
    weights that made it, `topk` of n rows where the loss needs it, `contrast_logprobs` float32[n] where an engine has
    scored behind another prompt too, `advantages` float32[n] where an estimator has set them. `weight` is how often
    each of its tokens counts in the loss (None: once). `rewards` float32[n] is set where the learner makes advantages
    of it: what is earned with each trained token, NaN where nothing is known. `chunks` are those that the segment is
    made of.
    """

    sample_id: int
    prompt_tokens: int
    start: int
    end: int
    complete: bool
    token_ids: NDArray[np.int32]
    behaviour_logprobs: NDArray[np.float32]
    teacher_logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    topk: TopK | None = None
    advantages: NDArray[np.float32] | None = None
    teacher: str = ""
    weight: float | None = None
    rewards: NDArray[np.float32] | None = None
    chunks: tuple[ChunkFacts, ...] = ()
    teacher_prompt: NDArray[np.int32] | None = None
    """int32[m]: what a teacher in the learner reads in place of the prompt; None: the same."""
    contrast_logprobs: NDArray[np.float32] | None = None
    contrast_prompt: NDArray[np.int32] | None = None
    """int32[c]: what a teacher in the learner reads beside that; None: nothing."""
    positions: NDArray[np.int32] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are trained."""
        return len(self.behaviour_logprobs)

    def sampled_runs(self) -> list[tuple[int, int]]:
        """The trained positions as half-open ranges, in order."""
        if self.positions is None:
            return [(self.start, self.end)]
        breaks = np.flatnonzero(np.diff(self.positions) > 1) + 1
        return [(int(run[0]), int(run[-1]) + 1) for run in np.split(self.positions, breaks)]

    def versioned_runs(self) -> list[tuple[int, int, int, int]]:
        """(start, end, oldest version, newest version) of each of `sampled_runs`."""
        runs, at, found = self.sampled_runs(), 0, []
        for start, end in runs:
            versions = self.versions[at : at + end - start]
            found.append((start, end, int(versions.min()), int(versions.max())))
            at += end - start
        return found

    def given_runs(self) -> list[tuple[int, int]]:
        """The positions in [start, end) that were given, as half-open ranges, in order."""
        if self.positions is None:
            return []
        ends = [self.start, *(end for _, end in self.sampled_runs())]
        starts = [*(start for start, _ in self.sampled_runs()), self.end]
        return [(low, high) for low, high in zip(ends, starts, strict=True) if low < high]

    @property
    def longest(self) -> int:
        """Tokens of the longest of the sequences that the learner forwards, the student's and the teacher's."""
        read = [len(prompt) for prompt in (self.teacher_prompt, self.contrast_prompt) if prompt is not None]
        return len(self.token_ids) + max([self.prompt_tokens, *read]) - self.prompt_tokens


def segment_of(
    untrained: Sequence[Piece],
    *,
    sample_id: int,
    prompt: NDArray[np.int32],
    trained: Sequence[NDArray[np.int32]],
    start: int,
    end: int,
    complete: bool,
    teacher: str,
    teacher_prompt: NDArray[np.int32] | None,
    contrast_prompt: NDArray[np.int32] | None,
) -> Segment:
    """Join the `untrained` pieces, which hold positions [start, end), behind the prompt and what was trained before.

    At least one of them must be sampled.
    """
    pieces = [piece for piece in untrained if piece.sampled]
    positions = None
    if len(pieces) < len(untrained):
        is_sampled = np.repeat([piece.sampled for piece in untrained], [len(piece.token_ids) for piece in untrained])
        positions = (np.flatnonzero(is_sampled) + start).astype(np.int32)
    return Segment(
        sample_id=sample_id,
        prompt_tokens=len(prompt),
        start=start,
        end=end,
        complete=complete,
        token_ids=np.concatenate([prompt, *trained, *(piece.token_ids for piece in untrained)]),
        behaviour_logprobs=np.concatenate([piece.behaviour_logprobs for piece in pieces]),
        teacher_logprobs=np.concatenate([piece.teacher_logprobs for piece in pieces]),
        versions=np.concatenate([np.full(len(piece.token_ids), piece.version, np.int32) for piece in pieces]),
        topk=join([piece.topk for piece in pieces]),
        teacher=teacher,
        chunks=tuple(piece.facts for piece in untrained if piece.facts is not None),
        teacher_prompt=teacher_prompt,
        contrast_logprobs=joined([piece.contrast_logprobs for piece in pieces]),
        contrast_prompt=contrast_prompt,
        positions=positions,
    )


def joined(parts: Sequence[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    """Those that are there, back to back; None where none is."""
    there = [part for part in parts if part is not None]
    return np.concatenate(there) if there else None
