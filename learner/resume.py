"""The learner's part of a checkpoint: Megatron's sharded format (`torch_dist`), exact to resume, reshardable.

    all ranks -> <folder>/__<rank>_<n>.distcp, common.pt, .metadata

The student's tensors have Megatron's names, those of a critic the same behind `critic.`, those of an average that
teaches behind `average.`.
Each data-parallel rank writes its own share of the optimizer's states (`checkpoints.states`).
`opd_async.run.checkpoints` makes the folder around it, seals it once every writer has finished, and refuses one that
was cut short. Tensor-, pipeline- and data-parallel sizes may change between save and load. `checkpoints.model` does the
same with the weights alone, and needs no second copy of them in memory.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica

from opd_async.errors import StorageError
from opd_async.files import reserve, storage_failure, unwritten
from opd_async.learner.average import PREFIX as AVERAGE
from opd_async.learner.average import MovingTeacher
from opd_async.learner.checkpoints import fixes as checkpoint_fixes
from opd_async.learner.checkpoints.model import UNREADABLE, cause, holds, load_model, without_copies
from opd_async.learner.checkpoints.states import saved_states
from opd_async.learner.critic.value_model import PREFIX
from opd_async.learner.distributed.cpu import on_this_device, quiet
from opd_async.learner.errors import CheckpointError
from opd_async.learner.model.decoder import DecoderModel
from opd_async.learner.trainer import Trainer
from opd_async.run.checkpoints import Shards

SMALL_BYTES = 1 << 18
"""Of a rank's part of a checkpoint: names, shapes, padding."""
OPTIMIZER_FORMAT = "fully_reshardable"  # the others cannot change the tensor-parallel size


def save(trainer: Trainer, folder: Path) -> Shards:
    """Write weights and optimizer state of student and critic, weight version and random state to `folder`, replacing
    what is there; returns what all ranks have written.

    All ranks call it with the same folder; when it returns, all have written. The folder must be sealed after that.
    Raises `StorageError` on every rank where there is no room: nothing is written then but what room there was for.
    """
    checkpoint_fixes.install()
    state: dict[str, Any] = {"version": trainer.version, "random_state": torch.get_rng_state()}
    with quiet(), on_this_device(), _average(trainer) as average:
        state |= average
        for learning in _learning(trainer):
            checkpoint_fixes.prime_states(learning.optimizer)  # nothing to do but before the first step
            state |= _sharded(learning, loading=False)
            state[f"{learning.prefix}optimizer_step"] = checkpoint_fixes.optimizer_step(learning.optimizer)
        device = next(trainer.model.parameters()).device
        _write(state, folder, device)
    return _written(folder, device)


def _written(folder: Path, device: torch.device) -> Shards:
    """Every rank's files, as the host that has written them sees them."""
    sizes = [path.stat().st_size for path in folder.glob(f"__{dist.get_rank()}_*.distcp")]
    found = torch.tensor([len(sizes), sum(sizes)], dtype=torch.int64, device=device)
    dist.all_reduce(found)
    files, size = found.tolist()
    return Shards(files, size)


def _write(state: dict[str, Any], folder: Path, device: torch.device) -> None:
    """Have all ranks write their parts. Raises `StorageError` on every rank where there is no room."""
    _make_folder(folder, _bytes(state), device)
    try:
        without_copies(state)
        metadata = {"distrib_optim_sharding_type": OPTIMIZER_FORMAT}
        dist_checkpointing.save(state, str(folder), content_metadata=metadata)
    except UNREADABLE as error:
        if (found := storage_failure(error)) is None:
            raise
        raise StorageError(unwritten(folder, found)) from error


def _make_folder(folder: Path, size: int, device: torch.device) -> None:
    """Have rank 0 make an empty folder with room for `size` bytes of each rank; every rank hears if it cannot.

    Asked before anything is written: Megatron's writers wait for one another, and one that fails leaves others waiting.
    """
    total = torch.tensor([size], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    problem: OSError | None = None
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            reserve(folder, int(total))
        except OSError as error:
            problem = error
    failed = torch.tensor([0 if problem is None else problem.errno or errno.EIO], dtype=torch.int64, device=device)
    dist.all_reduce(failed)
    if number := int(failed):
        raise StorageError(unwritten(folder, problem or OSError(number, os.strerror(number))))


def _bytes(state: dict[str, Any]) -> int:
    """Bytes of what this rank writes: the tensors of which it is the main replica, and a little for everything else."""
    sharded = [one for one in nested_values(state) if isinstance(one, ShardedBase) and is_main_replica(one.replica_id)]
    tensors = [one.data for one in sharded if isinstance(one.data, torch.Tensor)]
    return SMALL_BYTES + sum(tensor.nbytes for tensor in tensors)


def load(trainer: Trainer, folder: Path) -> None:
    """Continue from what `save` wrote: weights, optimizers, weight version. All ranks call it.

    Raises `CheckpointError` if the folder is not a checkpoint, is unreadable, is of another model, or has no critic
    where the trainer has one.
    """
    checkpoint_fixes.install()
    if trainer.critic is not None and not holds(folder, PREFIX):
        raise CheckpointError(
            f"{folder} has no critic: it was saved with another advantage.estimator; resume with that one, or begin a "
            "run with this checkpoint as learner.load"
        )
    if isinstance(trainer.teacher, MovingTeacher) and not holds(folder, AVERAGE):
        raise CheckpointError(
            f"{folder} has no average that teaches: it was saved with other opd.self.weights; resume with those, or "
            "begin a run with this checkpoint as learner.load"
        )
    everyone = _learning(trainer)
    wanted: dict[str, Any] = {}
    try:
        with quiet(), on_this_device(), _average(trainer) as average:
            wanted |= average
            for learning in everyone:
                checkpoint_fixes.prime_states(learning.optimizer)
                wanted |= _sharded(learning, loading=True)
            state = dist_checkpointing.load(wanted, str(folder))
            for learning in everyone:
                _restore(learning, state)
            if isinstance(trainer.teacher, MovingTeacher):
                _load_weights(trainer.teacher.model, state, AVERAGE)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{folder} cannot be loaded into the model {trainer.config.model_path}: {cause(error)}; resume with the "
            f"model that the run was started with, or from another checkpoint"
        ) from error
    for learning in everyone:
        checkpoint_fixes.separate_steps(learning.optimizer)
    torch.set_rng_state(state["random_state"])
    trainer.version = int(state["version"])


def load_weights(trainer: Trainer, folder: Path) -> None:
    """Begin from the weights of a checkpoint, with a new optimizer and at weight version 0. As `load_model`."""
    load_model(trainer.model, folder)
    trainer.optimizer.reload_model_params()


@dataclass(frozen=True, slots=True)
class _Learning:
    """A model that is trained, and what is before its names."""

    model: DecoderModel
    optimizer: Any
    prefix: str = ""


def _learning(trainer: Trainer) -> list[_Learning]:
    critic = [] if trainer.critic is None else [_Learning(trainer.critic.model, trainer.critic.optimizer, PREFIX)]
    return [_Learning(trainer.model, trainer.optimizer), *critic]


def _restore(learning: _Learning, state: dict[str, Any]) -> None:
    """Take model and optimizer out of what was loaded."""
    prefix = learning.prefix
    _load_weights(learning.model, state, prefix)
    for index, part in enumerate(learning.optimizer.chained_optimizers):
        shards = state[f"{prefix}optimizers"][str(index)]
        loaded = {"param_state": shards, "param_state_sharding_type": OPTIMIZER_FORMAT}
        part.load_state_dict(checkpoint_fixes.at_step(part, state[f"{prefix}optimizer_step"]) | loaded)


def _load_weights(model: DecoderModel, state: dict[str, Any], prefix: str) -> None:
    model.load_state_dict({name.removeprefix(prefix): value for name, value in state[f"{prefix}model"].items()})


@contextmanager
def _average(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """Megatron's description of an average that teaches, in float32 within the block; empty where there is none."""
    if not isinstance(trainer.teacher, MovingTeacher):
        yield {}
        return
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    with trainer.teacher.in_float32() as model:
        yield {f"{AVERAGE}model": model.sharded_state_dict(prefix=AVERAGE, metadata=metadata)}


def _sharded(learning: _Learning, *, loading: bool) -> dict[str, Any]:
    """Megatron's description of what this rank holds: model and optimizer shards.

    Experts that are spread over ranks have an optimizer of their own. Its shards are named by their parameters, as all
    others are, so that a checkpoint loads whether they are or not; Megatron's own way keeps the two apart.
    """
    metadata = {
        "distrib_optim_sharding_type": OPTIMIZER_FORMAT,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    prefix, chained = learning.prefix, learning.optimizer.chained_optimizers
    model = learning.model.sharded_state_dict(prefix=prefix, metadata=metadata)
    parts: list[Any]
    if loading:
        with checkpoint_fixes.padded_buckets(learning.optimizer):
            described = (part.sharded_state_dict(model, is_loading=True, metadata=metadata) for part in chained)
            parts = [one["param_state"] for one in described]
    else:
        parts = [saved_states(part, model) for part in chained]
    return {f"{prefix}model": model, f"{prefix}optimizers": {str(index): part for index, part in enumerate(parts)}}
