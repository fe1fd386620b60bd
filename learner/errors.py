"""Errors of the learner that reach a user."""

from __future__ import annotations

from opd_async.errors import EngineError, InputError, RoleError


class LearnerError(RoleError):
    """A step cannot be taken: a batch that contradicts itself, a loss that is not finite, a model that does not fit."""


class ModelError(InputError):
    """A Hugging Face folder that the learner cannot load: unknown architecture, missing file, wrong shape."""


class CheckpointError(InputError):
    """A checkpoint that cannot be read, or does not match the model."""


class WeightSyncError(EngineError):
    """An engine refused, missed or corrupted a weight update; the message names the engine."""
