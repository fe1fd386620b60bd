"""Load a Hugging Face folder into the sharded model, stream full tensors out of it, and write a folder again.

load_hf      safetensors -> split -> this rank's parameters
hf_weights   this rank's parameters -> gather over tensor ranks -> [from the expert's rank] -> from its stage -> rank 0
save_hf      hf_weights -> files of <path>.tmp -> rename
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from opd_async.data.decoder_tensors import HEAD
from opd_async.data.weight_files import tensor_problems
from opd_async.errors import StorageError
from opd_async.files import unwritten
from opd_async.learner.errors import ModelError
from opd_async.learner.hf.files import Reader, Spec, write_folder
from opd_async.learner.hf.mapping import Slot, slots
from opd_async.learner.model.decoder import DecoderModel


@torch.no_grad()
def load_hf(model: DecoderModel, folder: Path) -> None:
    """Fill this rank's parameters from the safetensors of `folder`, cast to the model's dtype.

    Raises `ModelError` that names the tensor which is missing, has another shape than the config says, is not a plain
    number, or has no place in the model.
    """
    if problems := tensor_problems(folder, dict(hf_specs(model)), _optional(model)):
        raise ModelError("; ".join(problems))
    reader = Reader(folder)
    parameters = dict(model.named_parameters())
    wanted = local_slots(model)
    missing = set(parameters) - {name for name, _ in wanted} - model.own_parameters
    if missing:
        raise ModelError(f"no Hugging Face weights are known for {', '.join(sorted(missing))}")
    for name, slot in wanted:
        group = _tensor_group(slot)
        part = slot.split([reader.tensor(hf_name) for hf_name in slot.hf_names], group.rank(), group.size())
        if part.shape != parameters[name].shape:
            raise ModelError(
                f"{folder}: {', '.join(slot.hf_names)} give {tuple(part.shape)} where config.json asks for "
                f"{tuple(parameters[name].shape)}"
            )
        parameters[name].copy_(part)
    mark_shards(model)


def _optional(model: DecoderModel) -> set[str]:
    """Names that the folder may hold or lack: a tied LM head, and what the model has of its own in its place."""
    own = {name for slot in _slots(model) if slot.name in model.own_parameters for name in slot.hf_names}
    return own | {HEAD} if model.shape.tied else own


def mark_shards(model: DecoderModel) -> None:
    """Say which parameters are split between tensor-parallel ranks: the gradient norm counts others on one rank only.

    Megatron does it where it initialises them.
    """
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, slot in local_slots(model):
        parameters[name].tensor_model_parallel = slot.sharded


def local_slots(model: DecoderModel) -> list[tuple[str, Slot]]:
    """(parameter name, slot) of this pipeline stage; the last stage of a tied model holds the embedding once more.

    Parameters that are the model's own have no slot."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    everything = _slots(model)
    own = (None, parallel_state.get_expert_model_parallel_rank())
    local = [(slot.name, slot) for slot in everything if slot.stage == stage and slot.holder in own]
    if model.shape.tied and stage == parallel_state.get_pipeline_model_parallel_world_size() - 1 and stage > 0:
        local.append(("output_layer.weight", everything[0]))
    return [(name, slot) for name, slot in local if name not in model.own_parameters]


def _slots(model: DecoderModel) -> list[Slot]:
    return slots(
        model.shape,
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )


@torch.no_grad()
def hf_weights(model: DecoderModel, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Full tensors under their Hugging Face names, in the order of the network, on global rank 0.

    Every rank must iterate to the end, since the tensors are gathered by collectives on the way; ranks other than 0
    yield nothing. Tensors are on the model's device, cast to `dtype` if it is given; they may be views of its
    parameters. A tied LM head is left out.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    first_copy = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    first_experts = parallel_state.get_expert_data_parallel_rank() == 0
    first_shard = parallel_state.get_tensor_model_parallel_rank() == 0
    parameters = dict(model.named_parameters())
    dtype = dtype or next(model.parameters()).dtype
    device = model.inverse_frequencies.device
    for slot in _slots(model):
        full: list[Tensor] = []
        if slot.stage == stage and slot.holder is not None and first_experts:
            full = _from_holder(slot, parameters, device, dtype)
        elif slot.stage == stage and slot.holder is None and first_copy:
            full = _gather(parameters[slot.name].detach().to(dtype), slot)
        if slot.stage > 0 and first_shard and first_copy:
            full = _from_stage(slot, full, device, dtype)
        if dist.get_rank() == 0:
            yield from zip(slot.hf_names, full, strict=True)


def hf_specs(model: DecoderModel) -> list[Spec]:
    """Names and shapes of what `hf_weights` yields, in order."""
    return [spec for slot in _slots(model) for spec in zip(slot.hf_names, slot.hf_shapes, strict=True)]


def _tensor_group(slot: Slot) -> dist.ProcessGroup:
    """The ranks between which the slot's tensors are split."""
    if slot.holder is None:
        return parallel_state.get_tensor_model_parallel_group()
    return parallel_state.get_expert_tensor_parallel_group()


def _gather(part: Tensor, slot: Slot) -> list[Tensor]:
    """The slot's full tensors on every rank that holds a part of them."""
    group = _tensor_group(slot)
    parts = [part.contiguous()]
    if group.size() > 1:
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
    return list(slot.join(parts))


def _from_holder(
    slot: Slot, parameters: dict[str, torch.nn.Parameter], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """An expert's full tensors on every rank of the expert-parallel group, from the one that holds it."""
    group = parallel_state.get_expert_model_parallel_group()
    full = [torch.empty(shape, device=device, dtype=dtype) for shape in slot.hf_shapes]
    assert slot.holder is not None
    if slot.holder == group.rank():
        full = _gather(parameters[slot.name].detach().to(dtype), slot)
    if group.size() > 1:
        for tensor in full:
            dist.broadcast(tensor, src=dist.get_global_rank(group, slot.holder), group=group)
    return full


def _from_stage(slot: Slot, full: list[Tensor], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Broadcast `full` from the slot's stage to the stages before it (first tensor-parallel ranks only)."""
    group = parallel_state.get_pipeline_model_parallel_group()
    full = full or [torch.empty(shape, device=device, dtype=dtype) for shape in slot.hf_shapes]
    full = [tensor.contiguous() for tensor in full]
    for tensor in full:
        dist.broadcast(tensor, src=dist.get_global_rank(group, slot.stage), group=group)
    return full


def save_hf(model: DecoderModel, path: Path, source: Path) -> None:
    """Write the model as a Hugging Face folder: weights in the dtype of `source`, whose other files are copied.

    All ranks call it; rank 0 writes to `<path>.tmp` and renames at the end, so that `path` is whole or absent. Files of
    an existing `path` are replaced, its sub-folders stay. Rank 0 raises `StorageError` where there is no room.
    """
    dtype = getattr(torch, model.shape.dtype)
    weights = hf_weights(model, dtype)
    problem: OSError | None = None
    if dist.get_rank() == 0:
        try:
            write_folder(path, source, hf_specs(model), dtype, weights)
        except OSError as error:
            problem = error
    for _ in weights:  # the other ranks take part in gathering and are given nothing
        if problem is None:
            raise AssertionError("a weight came that no file has room for")
    dist.barrier()
    if problem is not None:
        raise StorageError(unwritten(path, problem)) from problem
