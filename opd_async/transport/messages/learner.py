"""Commands to the learner, and its answers. They go through the intake, so that all ranks see one order."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from opd_async.transport.wire import Float32, Float32Matrix, Int32, Int32Matrix, message


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
class AskTeacher:
    """Say what the teacher in the learner thinks of these texts: of each response token its logprob, and `topk` of the
    likeliest tokens in its place.

    `token_ids` are the texts back to back, prompts and responses; `sequence_lengths` and `prompt_lengths` int32[N].
    """

    token_ids: Int32
    sequence_lengths: Int32
    prompt_lengths: Int32
    topk: int


@message
@dataclass(frozen=True, slots=True)
class PartDone:
    """Learner rank 0 to the intake: `part` of the step at weight version `version` is trained, and was not the last."""

    version: int
    part: int


@message
@dataclass(frozen=True, slots=True)
class LearnerReply:
    """Answer of learner rank 0 to `Train`, `SyncWeights`, `SaveCheckpoint`, `ExportModel`, `AskTeacher`; `error` None:
    done. `version` is the learner's weight version after it.

    To `AskTeacher`, of the n response tokens of all texts: `teacher_logprobs` float32[n], and, where likeliest tokens
    were asked for, `topk_ids` int32[n, k] and `topk_logprobs` float32[n, k], fewer than asked for where the teacher has
    fewer tokens.
    """

    command: str
    version: int
    error: str | None
    stats: dict[str, float]
    _: KW_ONLY
    teacher_logprobs: Float32 | None = None
    topk_ids: Int32Matrix | None = None
    topk_logprobs: Float32Matrix | None = None
