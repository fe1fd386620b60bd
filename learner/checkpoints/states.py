"""The distributed optimizer's states as parts of the parameters' tensors, where they are: nobody gathers any.

    a rank's flat share of a parameter -> boxes of its shape -> shards that Megatron's format takes at any offset

Megatron's own `fully_reshardable` first gathers the states of all data-parallel ranks on each of them, three quarters
of a checkpoint, and one of them writes them. Here each writes its own. What is written has the same names, and is read
as that format is: `sharded_state_dict(is_loading=True)` asks for whole parameters, and gets them from whatever shards
there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

PREFIX = "optimizer.state"
STATES = ("param", "exp_avg", "exp_avg_sq")
"""float32 weights and AdamW's moments, in the library's names."""


class Box(NamedTuple):
    """A part of a tensor: where it begins on each axis, and how far it goes."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """The elements `start` to `end` of a flattened tensor of `shape`, in order: at most 2 * axes - 1 boxes."""
    if start >= end:
        return
    if len(shape) == 1:
        yield Box((start,), (end - start,))
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:  # within one row
        yield from _of_row(shape, last, start, end)
        return
    yield from _of_row(shape, first - 1, start, first * row)
    if first < last:
        yield Box((first, *[0] * (len(shape) - 1)), (last - first, *shape[1:]))
    yield from _of_row(shape, last, last * row, end)


def _of_row(shape: Sequence[int], index: int, start: int, end: int) -> Iterator[Box]:
    before = index * math.prod(shape[1:])
    for offset, size in boxes(shape[1:], start - before, end - before):
        yield Box((index, *offset), (1, *size))


def saved_states(optimizer: Any, model_state: dict[str, Any]) -> list[ShardedTensor]:
    """What this rank writes of one of Megatron's distributed optimizers.

    Args:
        optimizer: a `DistributedOptimizer`, whose parameters have states.
        model_state: Megatron's description of the model on this rank, with the parameters themselves as data.
    """
    described = {id(one.data): one for one in nested_values(model_state)}
    found: list[ShardedTensor] = []
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, share in bucket["param_map"].items():
                    states = optimizer._get_main_param_and_optimizer_states(parameter)
                    for name in STATES:
                        found += _shards(described[id(parameter)], parameter, share["param"], name, states[name])
    return found


def _shards(
    described: ShardedTensor | ShardedTensorFactory, parameter: Tensor, share: Any, name: str, state: Tensor
) -> Iterator[ShardedTensor]:
    """One state of one parameter: `state` are its elements from `share.start` to `share.end`."""
    flat = state.detach().view(-1)
    for part in nested_values(described.build() if isinstance(described, ShardedTensorFactory) else [described]):
        begins = part.data.storage_offset() - parameter.storage_offset()
        within = 0 <= begins <= parameter.numel() - part.data.numel()
        assert within and part.data.is_contiguous(), f"{part.key} is not a part of its parameter's memory"
        start, end = max(share.start, begins), min(share.end, begins + part.data.numel())
        for box in boxes(part.local_shape, start - begins, end - begins):
            size = math.prod(box.shape)
            yield _shard(part, f"{PREFIX}.{name}.{part.key}", box, flat[start - share.start :][:size])
            start += size


def _shard(part: ShardedTensor, key: str, box: Box, values: Tensor) -> ShardedTensor:
    """A box of a described tensor, at its place among all ranks; nobody else of the data-parallel ranks has it."""
    lead = part.prepend_axis_num
    shape = (*[1] * lead, *box.shape)
    within = (*[0] * lead, *box.offset)
    return replace(
        part,
        key=key,
        data=values.view(shape),
        dtype=torch.float32,
        local_shape=shape,
        global_offset=tuple(a + b for a, b in zip(part.global_offset, within, strict=True)),
        axis_fragmentations=None,
        replica_id=(*part.replica_id[:2], 0),
        prepend_axis_num=0,
    )
