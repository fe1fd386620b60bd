"""A model's weights alone in Megatron's sharded format (`torch_dist`): what a conversion, a first load, a teacher need.

    model on all ranks -> save_model -> <folder>/__<rank>_<n>.distcp, common.pt, .metadata -> load_model -> any ranks

`load_model` also reads the weights out of a learner's checkpoint (`learner.checkpoint`). Neither holds a second copy.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from opd_async.learner.checkpoints import fixes as checkpoint_fixes
from opd_async.learner.checkpoints.unpickle import plain
from opd_async.learner.distributed.cpu import on_this_device, quiet
from opd_async.learner.errors import CheckpointError
from opd_async.learner.model.decoder import DecoderModel

EMBEDDING = "embedding.word_embeddings.weight"
UNREADABLE = (CheckpointingException, CheckpointException, OSError, KeyError, RuntimeError, UnpicklingError)


def save_model(model: DecoderModel, folder: Path) -> None:
    """Write the weights alone to `folder`, which must not exist. All ranks call it; `load_model` reads them again."""
    checkpoint_fixes.install()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    with quiet(), on_this_device():
        state = _weights(model)
        without_copies(state)
        dist_checkpointing.save({"model": state}, str(folder))
    dist.barrier()


def load_model(model: DecoderModel, folder: Path, prefix: str = "", without: Collection[str] = ()) -> None:
    """Fill `model` with the weights that `save` or `save_model` wrote, cast to its dtype. All ranks call it.

    `prefix` is before their names in the checkpoint; the parameters `without` stay as they are. Raises
    `CheckpointError` if the folder is not a checkpoint, is unreadable, or is of another model.
    """
    checkpoint_fixes.install()
    try:
        with quiet(), on_this_device():
            state = _weights(model, prefix)
            for name in without:
                state.pop(prefix + name, None)
            dist_checkpointing.load({"model": state}, str(folder))  # into the parameters themselves
    except UNREADABLE as error:
        raise CheckpointError(
            f"{folder} cannot be loaded into a {model.shape.architecture} of {model.shape.layers} layers: "
            f"{cause(error)}; give a Megatron checkpoint (torch_dist) of the same model"
        ) from error


def holds(folder: Path, prefix: str) -> bool:
    """Whether a checkpoint has parameters whose names begin with `prefix`. `CheckpointError` if it is none."""
    return any(name.startswith(prefix) for name in _stored(folder))


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the weights in a checkpoint. `CheckpointError` if there is none."""
    stored = _stored(folder)
    if EMBEDDING not in stored:
        raise CheckpointError(f"{folder} is not a checkpoint of a model: it has no {EMBEDDING}")
    dtype: torch.dtype = stored[EMBEDDING].dtype
    return dtype


def _stored(folder: Path) -> dict[str, Any]:
    """Descriptions of the tensors in a checkpoint, by name."""
    checkpoint_fixes.install()
    try:
        with quiet():
            stored: dict[str, Any] = dist_checkpointing.load_tensors_metadata(str(folder))
    except UNREADABLE as error:
        raise CheckpointError(
            f"{folder} is not a Megatron checkpoint (torch_dist) of a model: {cause(error)}"
        ) from error
    return stored


def _weights(model: DecoderModel, prefix: str = "") -> dict[str, Any]:
    """Megatron's description of this rank's weights, where gate and up projections are views of one parameter."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {
        name: value
        for name, value in model.sharded_state_dict(prefix=prefix, metadata=metadata).items()
        if not name.endswith("_extra_state")
    }
    apply_factories(state)
    assert all(isinstance(value, ShardedTensor) for value in nested_values(state))
    return state


def without_copies(state: dict[str, Any]) -> None:
    """Prepare a described state for writing: the library copies every tensor on the CPU that is a view of another."""
    apply_factories(state)
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and tensor.data is not None:
            tensor.data = _own_bytes(tensor.data)


def _own_bytes(tensor: Tensor) -> Tensor:
    """The same memory as a tensor whose storage ends where it does: of a view on the CPU, the library makes a copy."""
    if tensor.device.type != "cpu":
        return tensor
    storage = torch.from_numpy(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return storage.view(tensor.dtype).view(tensor.shape)


def cause(error: BaseException) -> str:
    """The first rank's own error, where torch has wrapped those of all ranks with their tracebacks."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    first = next((failure for failure, _traceback in failures.values()), error)
    return plain(first)
