"""The learner's part of a checkpoint: Megatron's sharded format (`torch_dist`), exact to resume, reshardable.

    all ranks -> <folder>/__<rank>_<n>.distcp, common.pt, .metadata

`opd_async.checkpoints` makes the folder around it, seals it once every writer has finished, and refuses one that was
cut short. Tensor-, pipeline- and data-parallel sizes may change between save and load. `learner.model_checkpoint` does
the same with the weights alone, and needs no second copy of them in memory.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from learner import checkpoint_fixes
from learner.cpu import on_this_device, quiet
from learner.errors import CheckpointError
from learner.model_checkpoint import UNREADABLE, cause, load_model
from learner.trainer import Trainer

OPTIMIZER_FORMAT = "fully_reshardable"  # the others cannot change the tensor-parallel size


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
            "optimizer_step": checkpoint_fixes.optimizer_step(trainer.optimizer),
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
            for index, part in enumerate(trainer.optimizer.chained_optimizers):
                loaded = {"param_state": state["optimizers"][str(index)], "param_state_sharding_type": OPTIMIZER_FORMAT}
                part.load_state_dict(checkpoint_fixes.at_step(part, state["optimizer_step"]) | loaded)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{folder} cannot be loaded into the model {trainer.config.model_path}: {cause(error)}; resume with the "
            f"model that the run was started with, or from another checkpoint"
        ) from error
    checkpoint_fixes.separate_steps(trainer.optimizer)
    torch.set_rng_state(state["random_state"])
    trainer.version = int(state["version"])


def load_weights(trainer: Trainer, folder: Path) -> None:
    """Begin from the weights of a checkpoint, with a new optimizer and at weight version 0. As `load_model`."""
    load_model(trainer.model, folder)
    trainer.optimizer.reload_model_params()


def _sharded(trainer: Trainer, *, loading: bool) -> dict[str, Any]:
    """Megatron's description of what this rank holds: model and optimizer shards.

    Experts that are spread over ranks have an optimizer of their own. Its shards are named by their parameters, as all
    others are, so that a checkpoint loads whether they are or not; Megatron's own way keeps the two apart.
    """
    metadata = {
        "distrib_optim_sharding_type": OPTIMIZER_FORMAT,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = trainer.model.sharded_state_dict(metadata=metadata)
    with checkpoint_fixes.padded_buckets(trainer.optimizer):
        parts = [
            part.sharded_state_dict(model, is_loading=loading, metadata=metadata)["param_state"]
            for part in trainer.optimizer.chained_optimizers
        ]
    return {"model": model, "optimizers": {str(index): part for index, part in enumerate(parts)}}
