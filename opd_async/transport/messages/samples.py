"""Samples on their way: `Chunk` (rollout to teacher), `ScoredChunk` (teacher to intake), `Train` (to learner ranks).

`TrainedSample` tells the launcher of a few of them, for people to read.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd_async.transport.wire import Float32, Float32Matrix, Int32, Int32Matrix, Int64, message


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive new tokens of one response, all sampled from the same weights, or all given: not `sampled`.

    Given tokens (what a tool said, what a user would say) are context for the tokens behind them. Nobody scores or
    trains them: they have no logprobs, and their `weight_version` says only when they came.

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
    grant: int = 0
    """That of the `Lease`."""
    teacher_prompt_tokens: int = 0
    """Length of the prompt that the teacher reads in place of the student's; 0: it reads the student's."""
    teacher_prompt: Int32 | None = None
    """int32[teacher_prompt_tokens], that prompt, beside `context` where there is one."""
    contrast_prompt_tokens: int = 0
    """Length of the prompt behind which the teacher scores the response a second time; 0: there is none."""
    contrast_prompt: Int32 | None = None
    """int32[contrast_prompt_tokens], that prompt, beside `context` where there is one."""
    sampled: bool = True
    episode: int | None = None
    """Of a further sample: the leased one whose episode has begun it."""
    further: Int64 | None = None
    """int64[n] with the `finish` of a leased sample: the further ones that its episode has begun, if any."""
    turn_ends: Int32 | None = None
    """int32[n] beside `reward`, where turns have earned some of it: the position after each of them."""
    turn_rewards: Float32 | None = None
    """float32[n]: how much; the rest is earned with the response's last token."""

    @property
    def end(self) -> int:
        """Position after the chunk's last token."""
        return self.start + len(self.token_ids)

    @property
    def scored_prompt_tokens(self) -> int:
        """Tokens in front of the response in what the teacher reads."""
        return self.teacher_prompt_tokens or self.prompt_tokens

    @property
    def read_prompts(self) -> tuple[int, ...]:
        """Tokens of each prompt behind which the teacher scores the response: one, or two with a contrast."""
        first = self.scored_prompt_tokens
        return (first, self.contrast_prompt_tokens) if self.contrast_prompt_tokens else (first,)

    @property
    def acknowledged_at(self) -> int:
        """The value of `Acks.ends` from which on this chunk is held by the intake."""
        return self.end + (self.finish is not None)

    def scored(self, teacher_id: str, latency_s: float, teacher_logprobs: Float32) -> ScoredChunk:
        """The same tokens with the teacher's logprobs float32[n] (float32[0] where no teacher engine scores)."""
        return ScoredChunk(
            sample_id=self.sample_id,
            attempt=self.attempt,
            actor=self.actor,
            prompt_id=self.prompt_id,
            prompt_tokens=self.prompt_tokens,
            start=self.start,
            weight_version=self.weight_version,
            finish=self.finish,
            label=self.label,
            teacher_id=teacher_id,
            latency_s=latency_s,
            token_ids=self.token_ids,
            behaviour_logprobs=self.behaviour_logprobs,
            teacher_logprobs=teacher_logprobs,
            context=self.context,
            reward=self.reward,
            teacher=self.teacher,
            grant=self.grant,
            made_at=self.made_at,
            sampled=self.sampled,
            episode=self.episode,
            further=self.further,
            turn_ends=self.turn_ends,
            turn_rewards=self.turn_rewards,
        )


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredChunk:
    """A chunk with the teacher's logprobs of the same tokens (temperature 1); of given ones it has none.

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
    scored_version: int | None = None
    """The student's weights that made the scores, where its own engines make them (`opd.self.weights: live`)."""
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
    grant: int = 0
    """That of the `Lease`."""
    made_at: float = 0.0
    """When the chunk's last token arrived at the rollout actor."""
    teacher_prompt: Int32 | None = None
    """As in `Chunk`, where no teacher engine scores: the learner then needs it."""
    contrast_prompt: Int32 | None = None
    """The same."""
    contrast_logprobs: Float32 | None = None
    """float32[n]: the teacher's logprobs behind `Chunk.contrast_prompt`; None without one, and of given tokens."""
    sampled: bool = True
    """As in `Chunk`."""
    episode: int | None = None
    """As in `Chunk`."""
    further: Int64 | None = None
    """As in `Chunk`."""
    turn_ends: Int32 | None = None
    """As in `Chunk`."""
    turn_rewards: Float32 | None = None
    """As in `Chunk`."""

    @property
    def end(self) -> int:
        """Position after the chunk's last token."""
        return self.start + len(self.token_ids)


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedSample:
    """A response that a step has taken to its end, for `samples.jsonl`; only the first tokens of a long one.

    `prompt` int32[p] are the last of `prompt_tokens` tokens, `response` int32[n] the first of `response_tokens`. Per
    recorded token: `behaviour_logprobs` float32[n]; `teacher_logprobs` float32[n], float32[0] without teacher engines.
    Tokens [`given_starts[i]`, `given_ends[i]`) were given, not sampled, and have zeros in both; None: no token was.
    """

    version: int
    """Weights that the step started from which took the end."""
    sample_id: int
    prompt_id: int
    prompt_tokens: int
    response_tokens: int
    finish: str
    reward: float | None
    teacher: str
    prompt: Int32
    response: Int32
    behaviour_logprobs: Float32
    teacher_logprobs: Float32
    made_at: float
    """When the last token of the first chunk arrived at the rollout actor."""
    chunk_ends: Int32
    """Position after each chunk."""
    chunk_versions: Int32
    """Weights that made it."""
    chunk_made_s: Float32
    """Its arrival, in seconds after `made_at`."""
    chunk_latency_s: Float32
    """From its arrival to its score."""
    chunk_scored: Int32 | None = None
    """The student's weights that scored it, where its own engines do; of a given one those that it came with."""
    part_ends: Int32
    """Position after each part that a step took; more than one part means that the response was cut."""
    part_versions: Int32
    """Weights from which that step started."""
    given_starts: Int32 | None = None
    given_ends: Int32 | None = None
    episode: int | None = None
    """As in `Chunk`."""
    turn_ends: Int32 | None = None
    """As in `Chunk`."""
    turn_rewards: Float32 | None = None
    """As in `Chunk`."""


@message
@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """A step for one learner rank, or a part of one: its `StepBatch` as flat arrays, micro-batches back to back.

    `mb_tokens`, `mb_sequences`, `mb_rows` int32[M] say where each micro-batch ends; `sequence_lengths` int32[N];
    `topk_ids` int32[R, k] and `topk_logprobs` float32[R, k] as in `ScoredChunk`; `rewards` float32[R], those of
    `MicroBatch`; `sample_ids` int64[N]; `contrast_logprobs` float32[R], or none. Where a teacher in the learner reads
    other prompts: `prompt_lengths` and `teacher_prompt_lengths` int32[N] (0: the student's own prompt),
    `teacher_prompts` int32 back to back; and `contrast_prompt_lengths`, `contrast_prompts` where it scores behind
    others too.
    """

    version: int
    part: int
    last: bool
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
    sample_ids: Int64 | None = None
    prompt_lengths: Int32 | None = None
    teacher_prompt_lengths: Int32 | None = None
    teacher_prompts: Int32 | None = None
    contrast_logprobs: Float32 | None = None
    contrast_prompt_lengths: Int32 | None = None
    contrast_prompts: Int32 | None = None
