"""The learner's part of a checkpoint: Megatron's sharded format (`torch_dist`), exact to resume, reshardable.

    all ranks -> <folder>/__<rank>_<n>.distcp, common.pt, .metadata

`opd_async.checkpoints` makes the folder around it, seals it once every writer has finished, and refuses one that was
cut short. Tensor-, pipeline- and data-parallel sizes may change between save and load. `save_model` and `load_model` do
the same with the weights alone, and need no second copy of them in memory.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from learner import checkpoint_fixes
from learner.cpu import on_this_device, quiet
from learner.errors import CheckpointError
from learner.model import StudentModel
from learner.trainer import Trainer

OPTIMIZER_FORMAT = "fully_reshardable"  # the others cannot change the tensor-parallel size
EMBEDDING = "embedding.word_embeddings.weight"
UNREADABLE = (CheckpointingException, CheckpointException, OSError, KeyError, RuntimeError)


def save(trainer: Trainer, folder: Path) -> None:
    """Write weights, optimizer state, weight version and random state to `folder`, replacing what is there.

    All ranks call it with the same folder; when it returns, all have written. The folder must be sealed after that.
    """
    checkpoint_fixes.install()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    checkpoint_fixes.prime_states(trainer.optimizer)  # nothing to do but before the first step
    with quiet(), on_this_device():
        state = {
            **_sharded(trainer, loading=False),
            "version": trainer.version,
            "random_state": torch.get_rng_state(),
        }
        dist_checkpointing.save(state, str(folder), content_metadata={"distrib_optim_sharding_type": OPTIMIZER_FORMAT})
    dist.barrier()


def load(trainer: Trainer, folder: Path) -> None:
    """Continue from what `save` wrote: weights, optimizer, weight version. All ranks call it.

    Raises `CheckpointError` if the folder is not a checkpoint, is unreadable, or is of another model.
    """
    checkpoint_fixes.install()
    checkpoint_fixes.prime_states(trainer.optimizer)
    try:
        with quiet(), on_this_device():
            state = dist_checkpointing.load(_sharded(trainer, loading=True), str(folder))
            trainer.model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
    except UNREADABLE as error:
        raise CheckpointError(
            f"{folder} cannot be loaded into the model {trainer.config.model_path}: {_cause(error)}; resume with the "
            f"model that the run was started with, or from another checkpoint"
        ) from error
    checkpoint_fixes.separate_steps(trainer.optimizer)
    torch.set_rng_state(state["random_state"])
    trainer.version = int(state["version"])


def save_model(model: StudentModel, folder: Path) -> None:
    """Write the weights alone to `folder`, which must not exist. All ranks call it; `load_model` reads them again."""
    checkpoint_fixes.install()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    with quiet(), on_this_device():
        state = _weights(model)
        for tensor in nested_values(state):
            tensor.data = _own_bytes(tensor.data)
        dist_checkpointing.save({"model": state}, str(folder))
    dist.barrier()


def load_model(model: StudentModel, folder: Path) -> None:
    """Fill `model` with the weights that `save` or `save_model` wrote, cast to its dtype. All ranks call it.

    Raises `CheckpointError` if the folder is not a checkpoint, is unreadable, or is of another model.
    """
    try:
        with quiet(), on_this_device():
            dist_checkpointing.load({"model": _weights(model)}, str(folder))  # into the parameters themselves
    except UNREADABLE as error:
        raise CheckpointError(
            f"{folder} cannot be loaded into a {model.shape.architecture} of {model.shape.layers} layers: "
            f"{_cause(error)}; give a Megatron checkpoint (torch_dist) of the same model"
        ) from error


def load_weights(trainer: Trainer, folder: Path) -> None:
    """Begin from the weights of a checkpoint, with a new optimizer and at weight version 0. As `load_model`."""
    load_model(trainer.model, folder)
    trainer.optimizer.reload_model_params()


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the weights in a checkpoint. `CheckpointError` if there is none."""
    try:
        with quiet():
            dtype: torch.dtype = dist_checkpointing.load_tensors_metadata(str(folder))[EMBEDDING].dtype
    except UNREADABLE as error:
        raise CheckpointError(f"{folder} is not a Megatron checkpoint (torch_dist) of a model: {error}") from error
    return dtype


def _weights(model: StudentModel) -> dict[str, Any]:
    """Megatron's description of this rank's weights, where gate and up projections are views of one parameter."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {
        name: value
        for name, value in model.sharded_state_dict(metadata=metadata).items()
        if not name.endswith("_extra_state")
    }
    apply_factories(state)
    assert all(isinstance(value, ShardedTensor) for value in nested_values(state))
    return state


def _own_bytes(tensor: Tensor) -> Tensor:
    """The same memory as a tensor whose storage ends where it does: of a view on the CPU, the library makes a copy."""
    if tensor.device.type != "cpu":
        return tensor
    storage = torch.from_numpy(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return storage.view(tensor.dtype).view(tensor.shape)


def _cause(error: BaseException) -> BaseException:
    """The first rank's own error, where torch has wrapped those of all ranks with their tracebacks."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return next((failure for failure, _traceback in failures.values()), error)


def _sharded(trainer: Trainer, *, loading: bool) -> dict[str, Any]:
    """Megatron's description of what this rank holds: model and optimizer shards."""
    metadata = {
        "distrib_optim_sharding_type": OPTIMIZER_FORMAT,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = trainer.model.sharded_state_dict(metadata=metadata)
    with checkpoint_fixes.padded_buckets(trainer.optimizer):
        optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}
