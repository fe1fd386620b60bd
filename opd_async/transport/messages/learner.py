"""Commands to the learner, and its answers. They go through the intake, so that all ranks see one order."""

from __future__ import annotations

from dataclasses import dataclass

from opd_async.transport.wire import message


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
class PartDone:
    """Learner rank 0 to the intake: `part` of the step at weight version `version` is trained, and was not the last."""

    version: int
    part: int


@message
@dataclass(frozen=True, slots=True)
class LearnerReply:
    """Answer of learner rank 0 to `Train`, `SyncWeights`, `SaveCheckpoint`, `ExportModel`; `error` None: done.
    `version` is the learner's weight version after it."""

    command: str
    version: int
    error: str | None
    stats: dict[str, float]
