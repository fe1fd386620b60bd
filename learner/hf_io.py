"""Load a Hugging Face folder into the sharded model, stream full tensors out of it, and write a folder again.

load_hf      safetensors -> split -> this rank's parameters
hf_weights   this rank's parameters -> gather over tensor ranks -> send from its stage -> rank 0
save_hf      hf_weights -> files of <path>.tmp -> rename
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from learner.errors import ModelError
from learner.hf_files import Reader, Spec, write_folder
from learner.mapping import Slot, slots
from learner.model import DecoderModel


@torch.no_grad()
def load_hf(model: DecoderModel, folder: Path) -> None:
    """Fill this rank's parameters from the safetensors of `folder`, cast to the model's dtype.

    Raises `ModelError` that names the tensor which is missing or has another shape than the config says.
    """
    reader = Reader(folder)
    parameters = dict(model.named_parameters())
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    wanted = local_slots(model)
    missing = set(parameters) - {name for name, _ in wanted}
    if missing:
        raise ModelError(f"no Hugging Face weights are known for {', '.join(sorted(missing))}")
    for name, slot in wanted:
        part = slot.split([reader.tensor(hf_name) for hf_name in slot.hf_names], rank, size)
        if part.shape != parameters[name].shape:
            raise ModelError(
                f"{folder}: {', '.join(slot.hf_names)} give {tuple(part.shape)} where config.json asks for "
                f"{tuple(parameters[name].shape)}"
            )
        parameters[name].copy_(part)
        # Megatron marks shards where it initialises them; the gradient norm counts unmarked ones on one rank only.
        parameters[name].tensor_model_parallel = slot.sharded


def local_slots(model: DecoderModel) -> list[tuple[str, Slot]]:
    """(parameter name, slot) of this pipeline stage; the last stage of a tied model holds the embedding once more."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    size = parallel_state.get_pipeline_model_parallel_world_size()
    everything = slots(model.shape, size)
    local = [(slot.name, slot) for slot in everything if slot.stage == stage]
    if model.shape.tied and stage == size - 1 and stage > 0:
        local.append(("output_layer.weight", everything[0]))
    return local


@torch.no_grad()
def hf_weights(model: DecoderModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
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


def hf_specs(model: DecoderModel) -> list[Spec]:
    """Names and shapes of what `hf_weights` yields, in order."""
    everything = slots(model.shape, parallel_state.get_pipeline_model_parallel_world_size())
    return [spec for slot in everything for spec in zip(slot.hf_names, slot.hf_shapes, strict=True)]


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


def save_hf(model: DecoderModel, path: Path, source: Path) -> None:
    """Write the model as a Hugging Face folder: weights in the dtype of `source`, whose other files are copied.

    All ranks call it; rank 0 writes to `<path>.tmp` and renames at the end, so that `path` is whole or absent. Files of
    an existing `path` are replaced, its sub-folders stay.
    """
    dtype = getattr(torch, model.shape.dtype)
    weights = hf_weights(model, dtype)
    if dist.get_rank() == 0:
        write_folder(path, source, hf_specs(model), dtype, weights)
    for _ in weights:  # the other ranks take part in gathering and are given nothing
        raise AssertionError("a weight came that no file has room for")
    dist.barrier()
