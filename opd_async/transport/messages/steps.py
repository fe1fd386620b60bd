"""Between the dispatcher and the intake: what is held, taken and trained."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from opd_async.transport.wire import Int32, Int64, Intervals, message


@message
@dataclass(frozen=True, slots=True)
class Frontier:
    """What had been trained when the intake started: completed sample ids as half-open intervals int64[n, 2], and
    partly trained samples with the response tokens that were trained (flat, `partial_ends[i]` each), of which
    `partial_given[i]` were given and not sampled (None: none of any)."""

    version: int
    completed: Intervals
    partial_ids: Int64
    partial_ends: Int32
    partial_tokens: Int32
    _: KW_ONLY
    partial_given: Int32 | None = None


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class Acks:
    """What the intake holds, scored, of `sample_ids[i]` (attempt `attempts[i]`): all tokens before `ends[i]`, where
    `ends[i]` is one more once the end of the response is known too.

    `ready_tokens` could be trained in step `next_step`, the next to be taken: finished responses, and tokens whose
    age demands it. The step at `next_step`, if it is open, has trained `taken_tokens`, and the learner waits for more
    if it is `idle`. Generation under weights `hold` must stand still until the next update; None: it may go on."""

    next_step: int
    ready_tokens: int
    taken_tokens: int
    idle: bool
    hold: int | None

    sample_ids: Int64
    attempts: Int32
    actors: Int32
    ends: Int32


@message
@dataclass(frozen=True, slots=True)
class Version:
    """The learner and every engine hold weights `version`: the intake may take the next step. Every token made by
    weights `version - 1` or older lies before `ends[i]` of `sample_ids[i]`, or is already held."""

    version: int
    sample_ids: Int64
    attempts: Int32
    ends: Int32


@message
@dataclass(frozen=True, slots=True)
class NotSaved:
    """The intake cannot write its part of the checkpoint after step `version`, and has not asked the learner to."""

    version: int
    text: str


@message
@dataclass(frozen=True, slots=True)
class DrainRequest:
    """`max_staleness: 0`: the budget is there; pause the engines and send `Drained` with every token made so far."""

    version: int


@message
@dataclass(frozen=True, slots=True)
class Drained:
    """Answer to `DrainRequest`: like `Version`, but for tokens made by weights `version` itself."""

    version: int
    sample_ids: Int64
    attempts: Int32
    ends: Int32


@message
@dataclass(frozen=True, slots=True)
class Quiesce:
    """Take no further step; answer with `Quiesced`."""

    reason: str


@message
@dataclass(frozen=True, slots=True)
class Quiesced:
    """The learner will have weights `version` once it has trained every step that was taken."""

    version: int


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class PartStarted:
    """The intake has sent a part of a step, not the last one, to the learner; the step now has `tokens`."""

    version: int
    tokens: int
    taken_ids: Int64
    """The samples of the part; these columns are as in `StepStarted`."""
    taken_ends: Int32
    taken_complete: Int32
    taken_given: Int32 | None = None


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted:
    """The intake has sent a step, or its last part, to the learner; `stats` describe the whole step (tokens, samples,
    cuts, recomputed tokens). While it was open, the learner waited for `waited_s` seconds for more of it."""

    version: int
    waited_s: float
    stats: dict[str, float]
    staleness_counts: Int64
    """Trained tokens by staleness: entry k counts tokens of age k."""
    taken_ids: Int64
    """The samples of the step, or of its last part."""
    taken_ends: Int32
    """Up to where each is trained after the step."""
    taken_complete: Int32
    """1 where that is the end of the response."""
    taken_given: Int32 | None = None
    """How many tokens before `taken_ends` were given and not sampled; None: none of any sample."""


@message
@dataclass(frozen=True, slots=True)
class Reclaim:
    """The rollout actor of these samples is gone: stop accepting these attempts and return what has been scored."""

    sample_ids: Int64
    attempts: Int32


@message
@dataclass(frozen=True, slots=True)
class Reclaimed:
    """Per sample: the next attempt, its scored response tokens (flat, `ends[i]` each), and whether it is complete."""

    sample_ids: Int64
    attempts: Int32
    ends: Int32
    complete: Int32
    tokens: Int32
