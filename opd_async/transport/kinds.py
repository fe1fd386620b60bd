"""Words that several messages share."""

from __future__ import annotations

from enum import StrEnum


class Finish(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """A stop token; it is the last token of the response."""
    LENGTH = "length"
    """The response reached its maximum."""
    FAILED = "failed"
    """The episode that made it raised, or took too long: what it has sampled until then is there."""


class LeaseKind(StrEnum):
    """What a generation is for."""

    TRAIN = "train"
    EVAL_STUDENT = "eval_student"
    EVAL_TEACHER = "eval_teacher"
