"""A decoder that says what a prefix is worth: the body of a language model with one number for a head.

The head takes the LM head's place under its name, so that Megatron files it where it expects one. It begins at zero: a
new critic values every prefix at 0, whatever the parallel sizes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from opd_async.learner.checkpoints.model import holds, load_model
from opd_async.learner.config import LearnerConfig
from opd_async.learner.errors import CheckpointError
from opd_async.learner.hf.io import mark_shards
from opd_async.learner.model.architecture import ModelShape
from opd_async.learner.model.decoder import DecoderModel, build

PREFIX = "critic."
"""Before the names of a critic's parameters in a checkpoint, which holds the student beside it."""


class ValueModel(DecoderModel):
    """The part of the critic on this rank; every tensor-parallel rank of the last stage holds the whole head."""

    own_parameters = frozenset({"output_layer.weight", "output_layer.bias"})

    def __init__(self, config: Any, shape: ModelShape, padded_vocab: int) -> None:
        super().__init__(config, replace(shape, tied=False), padded_vocab)
        if self.post_process:
            self.output_layer = torch.nn.Linear(shape.hidden, 1, dtype=config.params_dtype)
            torch.nn.init.zeros_(self.output_layer.weight)
            torch.nn.init.zeros_(self.output_layer.bias)

    def values(self, hidden_RX: Tensor) -> Tensor:
        """float32[R]: the value of each prefix, from the last stage's hidden states [R, hidden]."""
        weight, bias = self.output_layer.weight.float(), self.output_layer.bias.float()
        return functional.linear(hidden_RX.float(), weight, bias)[:, 0]


def build_value_model(shape: ModelShape, config: LearnerConfig) -> ValueModel:
    """As `learner.model.build_model`."""
    return build(ValueModel, shape, config)


def load_critic(model: ValueModel, folder: Path) -> None:
    """Fill the model from the critic in a checkpoint, or, where it has none, all but the head from the model in it.

    All ranks call it; raises `CheckpointError` as `load_model` does.
    """
    mark_shards(model)
    try:
        if holds(folder, PREFIX):
            load_model(model, folder, prefix=PREFIX)
        else:
            load_model(model, folder, without=model.own_parameters)
    except CheckpointError as error:
        raise CheckpointError(
            f"the critic: {error}; its shape is read from advantage.critic.path, or the student's where there is none"
        ) from error
