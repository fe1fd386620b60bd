"""Between the first intake, which decides, and the others, which hold their share of the samples.

    other intake --Held--> first intake         what it holds now, without the tokens
    first intake --TakeShare--> other intake    what a step trains of it; also the learner's commands
    first intake --EndAttempts, ShowTrained--> other intake --Prefixes--> first intake

Both ends speak over the socket at which the first intake feeds its learner ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_async.transport.wire import Float32, Float64, Int32, Int64, message


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Chunks that an intake holds from now on, one a row, in order within each sample; and the samples (`again_ids`) of
    chunks that came again, because an acknowledgement was lost.

    Columns are fields of `ScoredChunk` and lengths of its arrays. NaN and -1 stand for None.
    """

    again_ids: Int64
    sample_ids: Int64
    attempts: Int32
    actors: Int32
    prompt_ids: Int64
    prompt_lengths: Int32
    starts: Int32
    lengths: Int32
    """Tokens of each chunk."""
    token_versions: Int32
    """Weights that made it."""
    given_chunks: Int32
    """1 where its tokens were given, not sampled."""
    counted: Int32
    """Of its behaviour logprobs, how many are not 0."""
    mean_behaviour_logprobs: Float32
    """Mean of those, in nats; 0 where there are none."""
    mean_teacher_logprobs: Float32
    """Mean of the teacher's logprobs of the same tokens; 0 with one teacher, which needs none."""
    teacher_prompt_lengths: Int32
    """Of the prompt that a teacher in the learner reads in place of the sample's; 0: of none."""
    contrast_prompt_lengths: Int32
    """Of the prompt that it reads beside that; 0: of none."""
    episodes: Int64
    finishes: Int32
    """Which of `Finish`."""
    scorers: Int32
    """Which of the plan's teachers."""
    whole_rewards: Float64
    further_counts: Int32
    further: Int64
    """Flat, `further_counts` of each row."""
    turn_counts: Int32
    turn_ends: Int32
    """Flat, `turn_counts` of each row."""
    turn_rewards: Float32


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class TakeShare:
    """What a step, or a part of it, takes of the samples that an intake holds: the tokens before `taken_ends[i]` of
    `taken_ids[i]` that are not trained yet. It packs those of them that are trained for its own ranks.

    `advantages` and `rewards` are those of the trained tokens, sample after sample; `segment_weights` one for each
    sample, as in `Segment`. None where the topology has none.
    """

    version: int
    part: int
    last: bool
    loss_tokens: int
    """Of the whole part, over all intakes."""
    micro_batches: int
    """How many each learner rank gets; what a share lacks is made up by empty ones."""
    completed_below: int
    """All leased samples below this one are trained."""
    further_below: int
    """The same of further samples."""
    taken_ids: Int64
    taken_ends: Int32
    taken_complete: Int32
    """1 where that is the end of the response."""
    taken_kept: Int32
    """1 where a filter lets the learner train it."""
    advantages: Float32 | None = None
    rewards: Float32 | None = None
    segment_weights: Float32 | None = None


@message
@dataclass(frozen=True, slots=True)
class EndAttempts:
    """As `Reclaim`, of samples that the other intake holds: answered by `Prefixes` with what it holds of each."""

    request: int
    sample_ids: Int64
    attempts: Int32


@message
@dataclass(frozen=True, slots=True)
class ShowTrained:
    """Say which samples are trained in part: answered by `Prefixes` with what is trained of each."""

    request: int


@message
@dataclass(frozen=True, slots=True)
class Prefixes:
    """The answer to question `request`: of each sample its first `ends[i]` response tokens (flat)."""

    request: int
    sample_ids: Int64
    ends: Int32
    tokens: Int32
