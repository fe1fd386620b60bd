"""Which tokens of a laid-out micro-batch a rank of a context group holds, and which keys its queries see.

    a sequence in 2 W chunks, W ranks    rank 0: chunks 0 and 2W-1    rank 1: chunks 1 and 2W-2    ...

    T  tokens of the whole layout    P  tokens of this rank: T / W    R  rows of the micro-batch    O  rows on this rank

A late chunk sees many keys and an early one few: one of each makes the ranks equal in work. Attention is exact: keys
and values of all ranks are gathered, queries stay where they are, and each of the two runs of chunks sees the prefix
that ends with it. Without context parallelism there is one run, of whole sequences.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Int64Array = NDArray[np.int64]
Found = TypeVar("Found", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` sequences of equal length side by side: of each, `length` queries and the `reach` keys that end with
    them. Queries are contiguous from token `start` of the rank, keys from `first_key` of the piece's keys."""

    start: int
    count: int
    length: int
    first_key: int
    reach: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous run of this rank's tokens as queries, with their keys."""

    segments: tuple[Segment, ...]
    keys: Tensor | None
    """int64[keys]: which gathered tokens the keys are; None: this rank's own, all of them."""
    query_bounds: Tensor
    """int32[N+1]: where sequences begin among the run's queries, for variable-length kernels."""
    key_bounds: Tensor
    """int32[N+1]: the same among its keys."""
    longest: tuple[int, int]
    """Most queries and most keys of a sequence."""


def whole(slots_N: Int64Array, device: torch.device) -> tuple[Piece, ...]:
    """One run: sequences of `slots_N` tokens, padding included, whose keys are their own tokens."""
    return (_piece(slots_N, slots_N, 0, None, device),)


def zigzag(slots_N: Int64Array, rank: int, size: int, device: torch.device) -> tuple[Int64Array, tuple[Piece, ...]]:
    """Tokens int64[P] of the whole layout that `rank` of `size` holds, in its order, and the two runs that they make.

    Every slot must be a multiple of 2 * `size`.
    """
    held = [_held(slots_N, other, size) for other in range(size)]
    gathered_T = np.empty(int(slots_N.sum()), np.int64)  # where a token of the layout stands when all are gathered
    gathered_T[np.concatenate(held)] = np.arange(len(gathered_T))
    starts_N, chunks_N = np.cumsum(slots_N) - slots_N, slots_N // (2 * size)
    pieces, start = [], 0
    for chunk in (rank, 2 * size - 1 - rank):
        reach_N = (chunk + 1) * chunks_N
        keys = torch.from_numpy(gathered_T[_ranges(starts_N, reach_N)]).to(device)
        pieces.append(_piece(chunks_N, reach_N, start, keys, device))
        start += int(chunks_N.sum())
    return held[rank], tuple(pieces)


def _held(slots_N: Int64Array, rank: int, size: int) -> Int64Array:
    """int64[P]: the tokens of a rank, its early chunks of all sequences first."""
    starts_N, chunks_N = np.cumsum(slots_N) - slots_N, slots_N // (2 * size)
    return np.concatenate([_ranges(starts_N + chunk * chunks_N, chunks_N) for chunk in (rank, 2 * size - 1 - rank)])


def _ranges(starts_N: Int64Array, lengths_N: Int64Array) -> Int64Array:
    """start, start + 1, ... of every range, one after the other."""
    ends_N = np.cumsum(lengths_N)
    return np.arange(int(ends_N[-1])) + np.repeat(starts_N - (ends_N - lengths_N), lengths_N)


def _piece(queries_N: Int64Array, keys_N: Int64Array, start: int, keys: Tensor | None, device: torch.device) -> Piece:
    segments, first, first_key = [], 0, 0
    for end in range(1, len(queries_N) + 1):
        if end == len(queries_N) or queries_N[end] != queries_N[first]:
            count, length, reach = end - first, int(queries_N[first]), int(keys_N[first])
            segments.append(Segment(start, count, length, first_key, reach))
            start, first_key, first = start + count * length, first_key + count * reach, end
    longest = int(queries_N.max()), int(keys_N.max())
    return Piece(tuple(segments), keys, _bounds(queries_N, device), _bounds(keys_N, device), longest)


def _bounds(lengths_N: Int64Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)).to(device)


class _AllRows(torch.autograd.Function):
    """Rows of all ranks of a context group, where each holds some of them; the way back keeps a rank's own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, own_O: Tensor, rows: int) -> Tensor:
        everything = values.new_zeros(rows, *values.shape[1:])
        everything[own_O] = values
        # every row is on one rank, the others hold zero
        dist.all_reduce(everything, group=parallel_state.get_context_parallel_group())
        ctx.save_for_backward(own_O)
        return everything

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (own_O,) = ctx.saved_tensors
        return grad_outputs[0][own_O], None, None


def all_rows(values: Tensor, own_O: Tensor | None, rows: int) -> Tensor:
    """All `rows` [R, ...] from each rank's [O, ...], with gradient, equal on all ranks of the context group.

    Every rank then computes the loss of all rows, and differentiates it in its own: the gradients add up over ranks to
    that of the loss. Without context parallelism (`own_O` None) nothing is to be done.
    """
    if own_O is None:
        return values
    everything: Tensor = _AllRows.apply(values, own_O, rows)
    return everything


def everywhere(found: Found, own_O: Tensor | None, rows: int) -> Found:
    """`all_rows` of every field of a dataclass of row tensors; fields that are None stay None."""
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return dataclasses.replace(
        found, **{name: all_rows(value, own_O, rows) for name, value in fields.items() if value is not None}
    )
