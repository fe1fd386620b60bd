"""Checkpoints: Megatron's sharded format, written whole or not at all, exact to resume, reshardable.

    <root>/step-00000050.tmp/   all ranks write shards, rank 0 the extra files, then complete.json
    <root>/step-00000050/       the rename: from here on it is a checkpoint

`complete.json` lists every file with its size, so that a folder that was cut short, by a full disk or by a copy that
broke off, is refused with the name of the file. Tensor-, pipeline- and data-parallel sizes may change between save and
load.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException

from learner import checkpoint_fixes
from learner.cpu import on_this_device, quiet
from learner.errors import CheckpointError
from learner.trainer import Trainer

MARKER = "complete.json"
OPTIMIZER_FORMAT = "fully_reshardable"


def save(trainer: Trainer, root: Path, *, keep: int, extra: Mapping[str, bytes] | None = None) -> Path:
    """Write the checkpoint of the trainer's version under `root`, then delete all but the newest `keep`.

    All ranks call it. `extra` (file name -> content, read on rank 0 only) lands in the same folder, under the same
    marker. Returns the checkpoint's folder.
    """
    checkpoint_fixes.install()
    final = root / f"step-{trainer.version:08d}"
    folder = final.with_name(f"{final.name}.tmp")
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
    if dist.get_rank() == 0:
        for name, content in (extra or {}).items():
            (folder / name).write_bytes(content)
        _complete(folder, final, trainer.version)
        prune(root, keep)
    dist.barrier()
    return final


def _sharded(trainer: Trainer, *, loading: bool) -> dict[str, Any]:
    """Megatron's description of what this rank holds: model and optimizer shards."""
    metadata = {
        "distrib_optim_sharding_type": OPTIMIZER_FORMAT,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = trainer.model.sharded_state_dict(metadata=metadata)
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer}


def _complete(folder: Path, final: Path, version: int) -> None:
    """Write the marker and give the folder its name. A checkpoint of the same version is replaced."""
    files = {str(file.relative_to(folder)): file.stat().st_size for file in _files(folder)}
    with (folder / MARKER).open("w", encoding="utf-8") as marker:
        json.dump({"step": version, "files": files}, marker, indent=2)
        marker.flush()
        os.fsync(marker.fileno())
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MARKER)


def verify(path: Path) -> int:
    """The step of the checkpoint at `path`; `CheckpointError` names the file that is missing or has another size."""
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        step, files = int(marker["step"]), dict(marker["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint: {MARKER} cannot be read ({error!r}); resume from an older one"
        ) from error
    for name, size in files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"checkpoint {path} was cut short: {name} {state} where {MARKER} says {size}; resume from an older one"
            )
    return step


def latest(root: Path) -> Path | None:
    """The checkpoint folder with the highest step under `root`, or None. It is not verified: `load` does that."""
    folders = _checkpoints(root)
    return folders[-1] if folders else None


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints under `root`, and what interrupted saves left behind."""
    for folder in [*_checkpoints(root)[:-keep], *root.glob("step-*.tmp")]:
        shutil.rmtree(folder)


def _checkpoints(root: Path) -> list[Path]:
    return sorted(folder for folder in root.glob("step-*") if folder.is_dir() and folder.suffix != ".tmp")


def load(trainer: Trainer, path: Path) -> None:
    """Continue from the checkpoint at `path`: weights, optimizer, weight version. All ranks call it.

    Raises `CheckpointError` if the checkpoint is not whole, or is of another model.
    """
    checkpoint_fixes.install()
    verify(path)
    checkpoint_fixes.prime_states(trainer.optimizer)
    try:
        with quiet(), on_this_device():
            state = dist_checkpointing.load(_sharded(trainer, loading=True), str(path))
            trainer.model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
    except (CheckpointingException, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit the model {trainer.config.model_path}: {error}; use the model that the "
            f"run was started with"
        ) from error
    checkpoint_fixes.separate_steps(trainer.optimizer)
    torch.set_rng_state(state["random_state"])
    trainer.version = int(state["version"])
