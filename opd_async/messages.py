"""Every message that crosses a process border, in one place.

Data path: `Chunk` (rollout to teacher), `ScoredChunk` (teacher to intake), `Train` (intake to learner ranks).
Control path: everything else, between the coordinator and the roles.

Ids: `sample_id` counts samples over the whole run; `attempt` grows each time a sample is leased again; positions count
response tokens from 0. Logprobs are natural logarithms. Versions count optimizer steps. Times are `time.time()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from opd_async.wire import Float32, Float32Matrix, Int32, Int32Matrix, Int64, Intervals, message


class Finish(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """A stop token; it is the last token of the response."""
    LENGTH = "length"
    """The response reached its maximum."""


class LeaseKind(StrEnum):
    """What a generation is for."""

    TRAIN = "train"
    EVAL_STUDENT = "eval_student"
    EVAL_TEACHER = "eval_teacher"


# --- data path -------------------------------------------------------------------------------------------------------


@message
@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive new tokens of one response, all made by the same weights.

    `context` is int32[prompt + start], prompt and earlier response, present on the first chunk that a teacher actor
    sees of a sample; later chunks carry None. An empty chunk (no tokens) only reports how the response ended.
    """

    sample_id: int
    attempt: int
    actor: int
    prompt_id: int
    prompt_tokens: int
    start: int
    weight_version: int
    finish: str | None
    label: str
    made_at: float
    token_ids: Int32
    behaviour_logprobs: Float32
    context: Int32 | None = None
    reward: float | None = None
    """With `finish`, where the topology has a reward: what the response earned, None if it could not be judged."""
    teacher: str = ""
    """The teacher that is to score it, as in `Lease`."""

    @property
    def end(self) -> int:
        """Position after the chunk's last token."""
        return self.start + len(self.token_ids)

    @property
    def acknowledged_at(self) -> int:
        """The value of `Acks.ends` from which on this chunk is held by the intake."""
        return self.end + (self.finish is not None)

    def scored(self, teacher_id: str, latency_s: float, teacher_logprobs: Float32) -> ScoredChunk:
        """The same tokens with the teacher's logprobs float32[n] (float32[0] where no teacher engine scores)."""
        return ScoredChunk(
            self.sample_id,
            self.attempt,
            self.actor,
            self.prompt_id,
            self.prompt_tokens,
            self.start,
            self.weight_version,
            self.finish,
            self.label,
            teacher_id,
            latency_s,
            self.token_ids,
            self.behaviour_logprobs,
            teacher_logprobs,
            self.context,
            reward=self.reward,
            teacher=self.teacher,
        )


@message
@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """A chunk with the teacher's logprobs of the same tokens (temperature 1).

    Where no teacher engine scores, rollout actors send it themselves, with `teacher_logprobs` float32[0].
    Where the loss needs them, `topk_ids` int32[n, k] and `topk_logprobs` float32[n, k] are the teacher's most likely
    tokens at the n positions; otherwise both are None and cost nothing.
    """

    sample_id: int
    attempt: int
    actor: int
    prompt_id: int
    prompt_tokens: int
    start: int
    weight_version: int
    finish: str | None
    label: str
    teacher_id: str
    latency_s: float
    """From the arrival of the chunk's last token at the rollout actor to its score."""
    token_ids: Int32
    behaviour_logprobs: Float32
    teacher_logprobs: Float32
    context: Int32 | None = None
    topk_ids: Int32Matrix | None = None
    topk_logprobs: Float32Matrix | None = None
    reward: float | None = None
    """As in `Chunk`."""
    teacher: str = ""
    """The teacher that scored it, by its own word."""

    @property
    def end(self) -> int:
        """Position after the chunk's last token."""
        return self.start + len(self.token_ids)


@message
@dataclass(frozen=True, slots=True)
class Train:
    """One step for one learner rank: its `StepBatch` as flat arrays, micro-batches back to back.

    `mb_tokens`, `mb_sequences`, `mb_rows` int32[M] say where each micro-batch ends; `sequence_lengths` int32[N];
    `topk_ids` int32[R, k] and `topk_logprobs` float32[R, k] as in `ScoredChunk`; `rewards` float32[N], NaN for none.
    """

    version: int
    loss_tokens: int
    mb_tokens: Int32
    mb_sequences: Int32
    mb_rows: Int32
    token_ids: Int32
    sequence_lengths: Int32
    rows: Int32
    behaviour_logprobs: Float32
    teacher_logprobs: Float32
    advantages: Float32
    staleness: Int32
    topk_ids: Int32Matrix | None = None
    topk_logprobs: Float32Matrix | None = None
    weights: Float32 | None = None
    rewards: Float32 | None = None


# --- every role to the coordinator -----------------------------------------------------------------------------------


@message
@dataclass(frozen=True, slots=True)
class Hello:
    """A role is up; `pid` tells one incarnation from the next."""

    role: str
    pid: int


@message
@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A role is alive; `counters` are its running totals (tokens, idle seconds, ...) for the report."""

    role: str
    counters: dict[str, float]


@message
@dataclass(frozen=True, slots=True)
class Failure:
    """A role cannot go on; the run ends with this text."""

    role: str
    text: str


# --- coordinator and rollout actors ----------------------------------------------------------------------------------


@message
@dataclass(frozen=True, slots=True)
class Lease:
    """Generate one response. `prefix` int32[k] holds response tokens that an earlier attempt already made and that
    have been scored: generation goes on behind them. `metadata` is the prompt's, as JSON, for its reward;
    `max_tokens` None stands for the topology's `rollout.sampling.max_response_tokens`; `teacher` names the one that
    scores, or, in an evaluation of teachers, generates; `given` int32[n] is the whole response where a data set gives
    it, and nothing is to be generated."""

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


@message
@dataclass(frozen=True, slots=True)
class LeaseDone:
    """A training response has ended and its last tokens have been sent; its reward may still be under way."""

    sample_id: int
    attempt: int
    response_tokens: int
    finish: str


@message
@dataclass(frozen=True, slots=True)
class EvalDone:
    """An evaluation response, complete; `reward` where evaluations are judged by it."""

    sample_id: int
    finish: str
    weight_version: int
    token_ids: Int32
    reward: float | None = None


@message
@dataclass(frozen=True, slots=True)
class Pause:
    """Stop the student engines, deliver everything generated so far, answer with `Paused`."""

    token: int


@message
@dataclass(frozen=True, slots=True)
class Paused:
    """All tokens made so far are on their way to a teacher: `ends[i]` response tokens exist of `sample_ids[i]`.

    Lists every sample that is being generated or has chunks the intake has not acknowledged.
    """

    token: int
    sample_ids: Int64
    attempts: Int32
    ends: Int32


@message
@dataclass(frozen=True, slots=True)
class Resume:
    """Every student engine holds weights `version`: generate. Teacher actors learn which scores the next step needs."""

    version: int


@message
@dataclass(frozen=True, slots=True)
class EngineDown:
    """The student engine at `url` is gone; its responses wait for the next `Resume`."""

    url: str


@message
@dataclass(frozen=True, slots=True)
class TeacherRestarted:
    """Teacher actor `index` has lost what it held: send it everything unacknowledged again, with context."""

    index: int


@message
@dataclass(frozen=True, slots=True)
class Reset:
    """Forget every sample (the learner goes back to a checkpoint). Engines stay paused until the next `Resume`."""

    token: int


@message
@dataclass(frozen=True, slots=True)
class ResetDone:
    """The role holds no sample any more."""

    role: str
    token: int


@message
@dataclass(frozen=True, slots=True)
class Stop:
    """Finish what is being sent and exit with code 0."""

    reason: str


# --- coordinator and intake ------------------------------------------------------------------------------------------


@message
@dataclass(frozen=True, slots=True)
class Frontier:
    """What had been trained when the intake started: completed sample ids as half-open intervals int64[n, 2], and
    partly trained samples with the response tokens that were trained (flat, `partial_ends[i]` each)."""

    version: int
    completed: Intervals
    partial_ids: Int64
    partial_ends: Int32
    partial_tokens: Int32


@message
@dataclass(frozen=True, slots=True)
class Acks:
    """What the intake holds, scored, of `sample_ids[i]` (attempt `attempts[i]`): all tokens before `ends[i]`, where
    `ends[i]` is one more once the end of the response is known too.

    `ready_tokens` could be trained in step `next_step`, the next to be planned: finished responses, and tokens whose
    age demands it."""

    next_step: int
    ready_tokens: int

    sample_ids: Int64
    attempts: Int32
    actors: Int32
    ends: Int32


@message
@dataclass(frozen=True, slots=True)
class Version:
    """The learner and every engine hold weights `version`: the next step may be planned. Every token made by weights
    `version - 1` or older lies before `ends[i]` of `sample_ids[i]`, or is already held."""

    version: int
    sample_ids: Int64
    attempts: Int32
    ends: Int32


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
    """Plan no further step; answer with `Quiesced`."""

    reason: str


@message
@dataclass(frozen=True, slots=True)
class Quiesced:
    """The learner will have weights `version` once it has trained every step that was planned."""

    version: int


@message
@dataclass(frozen=True, slots=True)
class StepStarted:
    """The intake has sent a step to the learner; `stats` describe it (tokens, samples, cuts, recomputed tokens)."""

    version: int
    stats: dict[str, float]
    staleness_counts: Int64
    """Trained tokens by staleness: entry k counts tokens of age k."""
    taken_ids: Int64
    """The samples of the step."""
    taken_ends: Int32
    """Up to where each is trained after the step."""
    taken_complete: Int32
    """1 where that is the end of the response."""


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


# --- coordinator to learner (through the intake, so that all ranks see one order) ------------------------------------


@message
@dataclass(frozen=True, slots=True)
class SyncWeights:
    """Send the current weights to these engines; `group` names a new process group when it changes. With `verify`,
    every engine must then prove by version and checksums that it holds them."""

    group: str
    engines: list[str]
    verify: bool


@message
@dataclass(frozen=True, slots=True)
class SaveCheckpoint:
    """Write the state after step `step` into `folder`; the intake adds the frontier."""

    step: int
    folder: str


@message
@dataclass(frozen=True, slots=True)
class ExportModel:
    """Write the student in Hugging Face format."""

    folder: str


@message
@dataclass(frozen=True, slots=True)
class LearnerReply:
    """Answer of learner rank 0 to `Train`, `SyncWeights`, `SaveCheckpoint`, `ExportModel`; `error` None: done.
    `version` is the learner's weight version after it."""

    command: str
    version: int
    error: str | None
    stats: dict[str, float]


Message = Any
"""Any registered message; receivers match on the class."""
