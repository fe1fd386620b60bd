"""The shape of a decoder, as the learner asks for it: `opd_async.data.decoder`, with the learner's own error."""

from __future__ import annotations

from pathlib import Path

from opd_async.data import decoder
from opd_async.data.decoder import ARCHITECTURES, ExpertShape, ModelShape
from opd_async.data.rope_shape import RopeShape
from opd_async.errors import InputError
from opd_async.learner.errors import ModelError

__all__ = ["ARCHITECTURES", "ExpertShape", "ModelShape", "RopeShape", "read_shape"]


def read_shape(model_path: Path) -> ModelShape:
    """The shape of the model in `model_path`; `ModelError` names the key that is missing or not supported."""
    if not (model_path / "config.json").is_file():
        raise ModelError(f"{model_path} has no config.json; models.student.path must be a Hugging Face folder")
    try:
        return decoder.read_shape(model_path)
    except InputError as error:
        raise ModelError(str(error)) from None
