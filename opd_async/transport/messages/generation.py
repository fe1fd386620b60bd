"""Between the dispatcher and the rollout and teacher actors: leases, evaluation, pause and go."""

from __future__ import annotations

from dataclasses import dataclass

from opd_async.transport.wire import Float32, Float32Matrix, Int32, Int32Matrix, Int64, message


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Generate one response. `prefix` int32[k] holds response tokens that an earlier attempt already made and that
    have been scored: generation goes on behind them. `metadata` is the prompt's, as JSON, for its reward;
    `max_tokens` None stands for the topology's `rollout.sampling.max_response_tokens`; `teacher` names the one that
    scores, or, in an evaluation of teachers, generates; `route` is the index of its actor that scores (0 where none
    does); `given` int32[n] is the whole response where a data set gives
    it, and nothing is to be generated; `teacher_prompt` int32[m] is what the teacher reads in place of `prompt` (None:
    the same), `contrast_prompt` int32[c] what it reads beside that (None: nothing)."""

    sample_id: int
    attempt: int
    prompt_id: int
    kind: str
    temperature: float
    label: str
    prompt: Int32
    prefix: Int32
    metadata: str = "{}"
    max_tokens: int | None = None
    teacher: str = ""
    given: Int32 | None = None
    teacher_prompt: Int32 | None = None
    contrast_prompt: Int32 | None = None
    evaluation_set: str = ""
    """Of an evaluation: the set that the prompt is of, which says how the response is judged."""
    grant: int = 0
    """What shows that the sample was leased, with this attempt to this actor; every chunk of it repeats it."""
    route: int = 0


@message
@dataclass(frozen=True, slots=True)
class LeaseDone:
    """A training response has ended and its last tokens have been sent; its reward may still be under way."""

    sample_id: int
    attempt: int
    response_tokens: int
    finish: str
    given_tokens: int = 0
    """How many of them nobody sampled."""


@message
@dataclass(frozen=True, slots=True)
class LeaseAway:
    """The episode of a training response waits for its own code, a tool perhaps, and needs no slot; not `away`: it
    generates again."""

    sample_id: int
    attempt: int
    away: bool


@message
@dataclass(frozen=True, slots=True)
class FurtherWanted:
    """The episode of a training response begins another conversation, which is to be a sample of its own."""

    sample_id: int
    attempt: int


@message
@dataclass(frozen=True, slots=True)
class FurtherLease:
    """That sample: it has the episode's prompt, attempt, teacher and label, and nothing of it exists."""

    episode: int
    """The leased sample whose episode it is."""
    attempt: int
    sample_id: int
    grant: int
    """As in `Lease`."""


@message
@dataclass(frozen=True, slots=True)
class FurtherUnused:
    """A `FurtherLease` came when nobody waited for it any more: nothing of the sample exists, and nothing will."""

    sample_id: int
    attempt: int


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class EvalDone:
    """An evaluation response, complete; `reward` where evaluations are judged by it.

    `student_logprobs` and `teacher_logprobs` float32[n] of its tokens where they are judged by the teacher; None where
    the teacher could not be asked. `reverse_kl` and `forward_kl` float32[n], nats, in the place of each token, where
    both sides were asked for their likeliest tokens. Where the teacher is in the learner, which the launcher asks,
    those of the student are `student_topk_ids` int32[n, k] and `student_topk_logprobs` float32[n, k].
    """

    sample_id: int
    finish: str
    weight_version: int
    token_ids: Int32
    reward: float | None = None
    student_logprobs: Float32 | None = None
    teacher_logprobs: Float32 | None = None
    reverse_kl: Float32 | None = None
    forward_kl: Float32 | None = None
    student_topk_ids: Int32Matrix | None = None
    student_topk_logprobs: Float32Matrix | None = None


@message
@dataclass(frozen=True, slots=True)
class Pause:
    """Stop the student engines, deliver everything generated so far, answer with `Paused`. Where these engines score,
    teacher actors are told too when they are to be sent weights: nothing is scored until the next `Resume`."""

    request: int
    """Numbers the request; the answer repeats it."""


@message
@dataclass(frozen=True, slots=True)
class Paused:
    """All tokens made so far are on their way to a teacher: `ends[i]` response tokens exist of `sample_ids[i]`.

    Lists every sample that is being generated or has chunks the intake has not acknowledged.
    """

    request: int
    """That of the `Pause`."""
    sample_ids: Int64
    attempts: Int32
    ends: Int32


@message
@dataclass(frozen=True, slots=True)
class Resume:
    """Every student engine holds weights `version`: generate, or score with them. Teacher actors learn which scores the
    next step needs."""

    version: int


@message
@dataclass(frozen=True, slots=True)
class EngineDown:
    """The student engine at `url` is gone; its responses wait for the next `Resume`."""

    url: str


@message
@dataclass(frozen=True, slots=True)
class EnginePace:
    """How long the engine at `url` has lately taken: medians in seconds, for an answer and for each of its tokens."""

    url: str
    answers: int
    wait_s: float
    token_s: float


@message
@dataclass(frozen=True, slots=True)
class EngineSlow:
    """The engine at `url` is far slower than its peers: its work goes to others. Not `slow`: it gets work again."""

    url: str
    slow: bool


@message
@dataclass(frozen=True, slots=True)
class EngineChanged:
    """The teacher engine at `url` has other weights than it began with: what it has scored is suspect."""

    url: str
    text: str


@message
@dataclass(frozen=True, slots=True)
class SuspectScores:
    """The teacher engine at `url` has been found wrong: it scored tokens [`starts[i]`, `ends[i]`) of `sample_ids[i]`
    since it was last known to be right."""

    url: str
    text: str
    sample_ids: Int64
    starts: Int32
    ends: Int32


@message
@dataclass(frozen=True, slots=True)
class TeacherRestarted:
    """Teacher actor `index` has lost what it held: send it everything unacknowledged again, with context."""

    index: int


@message
@dataclass(frozen=True, slots=True)
class Reset:
    """Forget every sample (the learner goes back to a checkpoint). Engines stay paused until the next `Resume`."""

    request: int
    """Numbers the request; the answer repeats it."""


@message
@dataclass(frozen=True, slots=True)
class ResetDone:
    """The role holds no sample any more."""

    role: str
    request: int
    """That of the `Reset`."""
