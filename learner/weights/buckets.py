"""Weights on the wire: tensors in buckets, each sent for itself or flattened into bytes, and their checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd_async.learner.hf.files import as_bytes

DIRECT_BYTES = 1 << 20
"""From this size on a tensor is worth a broadcast of its own: it then needs no copy on either side."""
CHECKSUM_HEX = 32
"""Length of a checksum."""


@dataclass(slots=True)
class Bucket:
    """Some named tensors that are announced together."""

    names: list[str] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    direct: bool = False
    """Each tensor has a broadcast of its own, from where it is; else all travel in one, flattened."""
    last: bool = False
    """True on the final bucket of an update."""

    @property
    def nbytes(self) -> int:
        """Payload, without alignment."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def dtypes(self) -> list[str]:
        """Torch dtype names: `float32`, `bfloat16`, ..."""
        return [str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors]

    @property
    def shapes(self) -> list[list[int]]:
        """Shape of each tensor."""
        return [list(tensor.shape) for tensor in self.tensors]

    def flatten(self, room: Tensor) -> Tensor:
        """uint8[...]: all tensors back to back, each starting at a multiple of its element size, written into `room`.

        The result is a view of `room`, or of new memory where that is too small. Memory that is touched for the first
        time costs several times the copy: hand the same room in again.
        """
        offsets, size = [], 0
        for tensor in self.tensors:
            size += -size % tensor.element_size()
            offsets.append(size)
            size += tensor.nbytes
        if len(room) < size or room.device != self.tensors[0].device:
            room = torch.empty(size, dtype=torch.uint8, device=self.tensors[0].device)
        for offset, tensor in zip(offsets, self.tensors, strict=True):
            room[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return room[:size]


def checksum(tensor: Tensor) -> str:
    """blake2b-128 of the tensor's bytes, row-major, as hex: what an engine computes over the weight that it holds."""
    return hashlib.blake2b(as_bytes(tensor).cpu().numpy().data, digest_size=16).hexdigest()


def buckets(
    named_tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, direct_bytes: int | None = None
) -> Iterator[Bucket]:
    """Fill buckets up to `bucket_bytes` (a larger tensor gets its own); the final one is marked `last`.

    Tensors of `direct_bytes` and more go into `direct` buckets; None: no tensor does.
    """
    filling = {direct: Bucket(direct=direct) for direct in (True, False)}
    for name, tensor in named_tensors:
        direct = direct_bytes is not None and tensor.nbytes >= direct_bytes
        bucket = filling[direct]
        if bucket.tensors and bucket.nbytes + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket = filling[direct] = Bucket(direct=direct)
        bucket.names.append(name)
        bucket.tensors.append(tensor)
    left = [bucket for bucket in filling.values() if bucket.tensors]
    for bucket in left:
        bucket.last = bucket is left[-1]
        yield bucket
