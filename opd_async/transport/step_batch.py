"""What a learner rank trains: packed micro-batches, built by the intake and consumed by `learner/`.

Shape suffixes: T packed tokens, N sequences, R trained rows (response positions with a teacher score).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from opd_async.estimators.topk import TopK

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TeacherPrompts:
    """The prompts of N sequences that a teacher in the learner reads in place of the student's."""

    prompt_lengths_N: Int32Array
    """int32[N]: tokens of the student's prompts."""
    lengths_N: Int32Array
    """int32[N]: tokens of the teacher's; 0 where it reads the student's."""
    token_ids: Int32Array
    """The teacher's prompts, back to back."""

    @classmethod
    def none(cls, sequences: int) -> TeacherPrompts:
        """Of sequences that teacher and student read alike."""
        nothing = np.zeros(sequences, np.int32)
        return cls(nothing, nothing, np.zeros(0, np.int32))


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences back to back (prompt and response up to the last trained token), with the rows to train.

    `token_ids` int32[T]; `cu_seqlens` int32[N+1]; `rows` int32[R], ascending: the index into T of the position whose
    logits predict the target, so that the target is `token_ids[rows + 1]`; per row: `behaviour_logprobs` float32[R]
    (nats, what the token was sampled with), `teacher_logprobs` float32[R] (nats; float32[0] where no teacher engine
    scores), `advantages` float32[R] (the estimator's, zero in pure distillation), `staleness` int32[R] (optimizer steps
    between the weights that made the token and those that train it), `topk` (R rows, None unless the loss needs it),
    `weights` float32[R] (how often a row counts in the loss, 1 in the step's mean; None: once each), `rewards`
    float32[R] (what is earned with a row's token; NaN in all rows of a response without a reward; None unless the
    learner makes advantages of them: then all sampled tokens of a response are rows). T = 0 is an empty micro-batch: it
    adds nothing but takes part in collectives. `sample_ids` int64[N]: whose each sequence is, for messages (None where
    there are no samples).
    """

    token_ids: Int32Array
    cu_seqlens: Int32Array
    rows: Int32Array
    behaviour_logprobs: Float32Array
    teacher_logprobs: Float32Array
    advantages: Float32Array
    staleness: Int32Array
    topk: TopK | None = None
    weights: Float32Array | None = None
    rewards: Float32Array | None = None
    sample_ids: Int64Array | None = None
    teacher_prompts: TeacherPrompts | None = None
    """None: a teacher in the learner reads what the student reads."""
    contrast_logprobs: Float32Array | None = None
    """float32[R]: the teacher's behind other prompts, where an engine has scored there too; None: nothing."""
    contrast_prompts: TeacherPrompts | None = None
    """What a teacher in the learner reads beside its prompts; None: nothing."""

    def as_read_by_teacher(self) -> MicroBatch:
        """The same responses and rows, in the same order, behind the prompts that the teacher reads."""
        return self._behind(self.teacher_prompts)

    def as_read_beside(self) -> MicroBatch:
        """The same behind the prompts that the teacher reads beside these."""
        return self._behind(self.contrast_prompts)

    def _behind(self, read: TeacherPrompts | None) -> MicroBatch:
        if read is None:
            return self
        prompts = np.split(read.token_ids, np.cumsum(read.lengths_N)[:-1])
        sequences = np.split(self.token_ids, self.cu_seqlens[1:-1])
        own_N = np.where(read.lengths_N > 0, read.prompt_lengths_N, 0)  # what the teacher's prompt takes the place of
        parts = [np.concatenate([p, s[own:]]) for p, s, own in zip(prompts, sequences, own_N.tolist(), strict=True)]
        bounds = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
        moved_N = bounds[:-1] - self.cu_seqlens[:-1] + read.lengths_N - own_N
        sequence_R = np.searchsorted(self.cu_seqlens, self.rows, side="right") - 1
        return replace(
            self,
            token_ids=np.concatenate(parts),
            cu_seqlens=bounds,
            rows=(self.rows + moved_N[sequence_R]).astype(np.int32),
            teacher_prompts=None,
            contrast_prompts=None,
        )


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One data-parallel rank's share of one optimizer step, or of a part of one.

    `version` is the weight version before the step (after it: `version + 1`); `loss_tokens` counts the trained tokens
    over all data-parallel ranks, and the step's sum of it is the denominator of the loss; `micro_batches` has the same
    length on every rank. A step comes in the parts 0, 1, ...; with the `last` one it is applied.
    """

    version: int
    loss_tokens: int
    micro_batches: tuple[MicroBatch, ...]
    part: int = 0
    last: bool = True
