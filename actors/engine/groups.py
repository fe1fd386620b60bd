"""Join weight-update process groups as SGLang does, receive broadcasts, and survive failures.

The trainer is rank 0 of each group and the only sender. Works without a default process group.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from opd_async.actors.engine.errors import WeightError


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """Where and as whom to join: this engine is rank `rank` of `world_size`."""

    master_address: str
    master_port: int
    rank: int
    world_size: int
    group_name: str
    backend: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is about to be broadcast."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightGroups:
    """The groups this engine belongs to, by name."""

    def __init__(self, timeout: float, device: torch.device) -> None:
        self._timeout = timeout
        self._device = device
        self._groups: dict[str, tuple[Any, str]] = {}
        # kept from one bucket to the next: memory that is touched for the first time costs several times the copy
        self._room = torch.empty(0, dtype=torch.uint8)

    def join(self, spec: GroupSpec) -> None:
        """Rendezvous with the trainer; blocks until all ranks are there or the deadline passes (WeightError)."""
        if spec.group_name in self._groups:
            raise WeightError(f"weight group {spec.group_name} exists already: destroy it first")
        if not 0 < spec.rank < spec.world_size:
            raise WeightError(f"rank_offset {spec.rank} must lie in [1, world_size) with world_size {spec.world_size}")
        timeout = timedelta(seconds=self._timeout)
        address = f"tcp://{spec.master_address}:{spec.master_port}"
        try:
            store, rank, world_size = next(
                iter(rendezvous(address, rank=spec.rank, world_size=spec.world_size, timeout=timeout))
            )
            # The rendezvous applies its timeout to connecting only.
            store.set_timeout(timeout)
            group, _ = c10d._new_process_group_helper(
                world_size,
                rank,
                [],
                dist.Backend(spec.backend),
                c10d.PrefixStore(spec.group_name, store),
                group_name=spec.group_name,  # type: ignore[arg-type]  # a NewType over str
                timeout=timeout,
            )
        except (RuntimeError, ValueError) as error:
            raise WeightError(f"cannot join weight group {spec.group_name} at {address}: {_reason(error)}") from error
        # Without this map dist.broadcast cannot tell that source rank 0 of the group is the trainer.
        c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
        self._groups[spec.group_name] = (group, spec.backend)

    def leave(self, name: str) -> None:
        """Destroy a group. Raises WeightError when this engine is not in it."""
        group, _ = self._find(name)
        del self._groups[name]
        try:
            dist.destroy_process_group(group)
        except RuntimeError as error:
            raise WeightError(f"weight group {name} was left, but closing it failed: {_reason(error)}") from error

    def require(self, name: str) -> None:
        """Raise WeightError unless this engine is in group `name`."""
        self._find(name)

    def receive(
        self, name: str, tensors: Sequence[TensorSpec], flattened: bool, places: Sequence[torch.Tensor | None] = ()
    ) -> list[torch.Tensor]:
        """Receive tensors from rank 0, one broadcast each, or all in one uint8 bucket.

        One broadcast each: a tensor is received into its place, where `places` has one that the backend can write to,
        and is then that place. On failure the group is left, since its ranks no longer agree on what comes next, and
        WeightError is raised.
        """
        group, backend = self._find(name)
        # gloo moves host memory only; writing into the model copies to its device.
        device = self._device if backend == "nccl" else torch.device("cpu")
        if flattened:
            buffers = [self._room_for(bucket_layout(tensors)[1], device)]
        else:
            buffers = [
                place
                if place is not None and place.device.type == device.type and place.is_contiguous()
                else torch.empty(spec.shape, dtype=spec.dtype, device=device)
                for spec, place in zip(tensors, places or [None] * len(tensors), strict=True)
            ]
        # One deadline for the whole update, however many broadcasts it is made of.
        deadline = time.monotonic() + self._timeout
        try:
            works = [dist.broadcast(buffer, src=0, group=group, async_op=True) for buffer in buffers]
            for work in works:
                if work is not None:
                    work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
        except (RuntimeError, ValueError) as error:
            self._abandon(name)
            changed = "No weight was changed" if flattened else "Some weights may be new, or broken"
            raise WeightError(
                f"broadcast in weight group {name} failed: {_reason(error)}. {changed}; the group was "
                f"left: join again with /init_weights_update_group",
                500,
            ) from error
        return split_bucket(buffers[0], tensors) if flattened else buffers

    def _room_for(self, size: int, device: torch.device) -> torch.Tensor:
        """Return a uint8[size] whose content is lost at the next call; updates run one at a time."""
        if len(self._room) < size or self._room.device != device:
            self._room = torch.empty(size, dtype=torch.uint8, device=device)
        return self._room[:size]

    def _find(self, name: str) -> tuple[Any, str]:
        if name not in self._groups:
            raise WeightError(f"weight group {name} is unknown: call /init_weights_update_group first")
        return self._groups[name]

    def _abandon(self, name: str) -> None:
        try:
            self.leave(name)
        except WeightError:
            # The group broke before; the broadcast's own error is the one worth reporting.
            return


def _reason(error: Exception) -> str:
    """Return the first line of an error; torch appends a C++ stack."""
    return str(error).partition("\n")[0]


def bucket_layout(tensors: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Return each tensor's byte offset in a bucket, aligned to its dtype's size, and the bucket's size in bytes."""
    offsets, at = [], 0
    for spec in tensors:
        size = spec.dtype.itemsize
        at = -(-at // size) * size
        offsets.append(at)
        at += spec.nbytes
    return offsets, at


def split_bucket(bucket: torch.Tensor, tensors: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """Return views of the tensors in a uint8 bucket."""
    offsets, _ = bucket_layout(tensors)
    return [
        bucket[at : at + spec.nbytes].view(spec.dtype).view(spec.shape)
        for at, spec in zip(offsets, tensors, strict=True)
    ]
