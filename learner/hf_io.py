"""Load a Hugging Face folder into the sharded model, stream full tensors out of it, and write a folder again.

load_hf      safetensors -> split -> this rank's parameters
hf_weights   this rank's parameters -> gather over tensor ranks -> send from its stage -> rank 0
save_hf      hf_weights -> <path>.tmp -> rename
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from learner.errors import ModelError
from learner.mapping import Slot, slots
from learner.model import StudentModel

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 4 << 30


class _Checkpoint:
    """The safetensors files of a folder, opened lazily."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] | None = None
        try:
            if (folder / INDEX_NAME).exists():
                self._file_of = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ModelError(f"{folder / INDEX_NAME} is not a safetensors index: {error!r}") from error

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored; `ModelError` if the folder does not hold it."""
        file_name = SINGLE_NAME if self._file_of is None else self._file_of.get(name, "")
        path = self._folder / file_name
        try:
            if file_name not in self._files:
                self._files[file_name] = safe_open(str(path), framework="pt")
            tensor: Tensor = self._files[file_name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read weight {name} from {path}: {error}") from error
        return tensor


@torch.no_grad()
def load_hf(model: StudentModel, folder: Path) -> None:
    """Fill this rank's parameters from the safetensors of `folder`, cast to the model's dtype.

    Raises `ModelError` that names the tensor which is missing or has another shape than the config says.
    """
    checkpoint = _Checkpoint(folder)
    parameters = dict(model.named_parameters())
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    wanted = _local_slots(model)
    missing = set(parameters) - {name for name, _ in wanted}
    if missing:
        raise ModelError(f"no Hugging Face weights are known for {', '.join(sorted(missing))}")
    for name, slot in wanted:
        part = slot.split([checkpoint.tensor(hf_name) for hf_name in slot.hf_names], rank, size)
        if part.shape != parameters[name].shape:
            raise ModelError(
                f"{folder}: {', '.join(slot.hf_names)} give {tuple(part.shape)} where config.json asks for "
                f"{tuple(parameters[name].shape)}"
            )
        parameters[name].copy_(part)
        # Megatron marks shards where it initialises them; the gradient norm counts unmarked ones on one rank only.
        parameters[name].tensor_model_parallel = slot.sharded


def _local_slots(model: StudentModel) -> list[tuple[str, Slot]]:
    """(parameter name, slot) of this pipeline stage; the last stage of a tied model holds the embedding once more."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    size = parallel_state.get_pipeline_model_parallel_world_size()
    everything = slots(model.shape, size)
    local = [(slot.name, slot) for slot in everything if slot.stage == stage]
    if model.shape.tied and stage == size - 1 and stage > 0:
        local.append(("output_layer.weight", everything[0]))
    return local


@torch.no_grad()
def hf_weights(model: StudentModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Full tensors under their Hugging Face names, in the order of the network, on global rank 0.

    Every rank must iterate to the end, since the tensors are gathered by collectives on the way; ranks other than 0
    yield nothing. Tensors are on the model's device, contiguous, cast to `dtype` if it is given; a tied LM head is
    left out.
    """
    if parallel_state.get_data_parallel_rank() != 0:
        return
    stage = parallel_state.get_pipeline_model_parallel_rank()
    first_shard = parallel_state.get_tensor_model_parallel_rank() == 0
    parameters = dict(model.named_parameters())
    dtype = dtype or next(model.parameters()).dtype
    for slot in slots(model.shape, parallel_state.get_pipeline_model_parallel_world_size()):
        full: list[Tensor] = []
        if slot.stage == stage:
            full = _gather(parameters[slot.name].detach().to(dtype), slot)
        if slot.stage > 0 and first_shard:
            full = _from_stage(slot, full, model.inverse_frequencies.device, dtype)
        if dist.get_rank() == 0:
            yield from zip(slot.hf_names, full, strict=True)


def _gather(part: Tensor, slot: Slot) -> list[Tensor]:
    """The slot's full tensors on every tensor-parallel rank of its stage."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [part.contiguous()]
    if group.size() > 1:
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
    return [tensor.contiguous() for tensor in slot.join(parts)]


def _from_stage(slot: Slot, full: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Broadcast `full` from the slot's stage to the stages before it (first tensor-parallel ranks only)."""
    group = parallel_state.get_pipeline_model_parallel_group()
    full = full or [torch.empty(shape, device=device, dtype=dtype) for shape in slot.hf_shapes]
    for tensor in full:
        dist.broadcast(tensor, src=dist.get_global_rank(group, slot.stage), group=group)
    return full


def save_hf(model: StudentModel, path: Path, source: Path) -> None:
    """Write the model as a Hugging Face folder: weights in the dtype of `source`, whose other files are copied.

    All ranks call it; rank 0 writes to `<path>.tmp` and renames at the end, so that `path` is whole or absent. An
    existing `path` is replaced.
    """
    weights = hf_weights(model, getattr(torch, model.shape.dtype))
    if dist.get_rank() != 0:
        for _ in weights:
            raise AssertionError("only rank 0 yields weights")
    else:
        _write_folder(weights, path, source)
    dist.barrier()


def _write_folder(weights: Iterator[tuple[str, Tensor]], path: Path, source: Path) -> None:
    folder = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and ".safetensors" not in file.name and file.suffix not in (".bin", ".pt", ".pth"):
            shutil.copy2(file, folder / file.name)
    files: list[list[str]] = []
    total = 0
    for shard in _shards(weights):
        files.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, str(folder / f"shard-{len(files)}"), metadata={"format": "pt"})
    _name_shards(folder, files, total)
    shutil.rmtree(path, ignore_errors=True)
    folder.rename(path)


def _shards(weights: Iterator[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Group the stream into files of about SHARD_BYTES."""
    shard: dict[str, Tensor] = {}
    for name, tensor in weights:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = tensor.cpu()
    yield shard


def _name_shards(folder: Path, files: list[list[str]], total: int) -> None:
    """Give the files the names that Hugging Face readers look for, with an index if there are several."""
    if len(files) == 1:
        (folder / "shard-1").rename(folder / SINGLE_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
