"""Lay a packed micro-batch out for attention: sequences of similar length side by side, so that each group of them is
one batched attention call instead of one call per sequence.

    T  tokens of the micro-batch as it came     P  tokens as laid out (padding included)
    N  sequences                                R  trained rows, with K ids of the teacher's top-k each

Padding always stands to the right of a sequence, where causal attention never looks, so no mask is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from opd_async.batches import MicroBatch

PAD_ID = 0
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` sequences of `length` tokens each, contiguous from token `start` of the layout."""

    start: int
    count: int
    length: int


@dataclass
class Packing(PackedSeqParams):
    """What travels through Megatron's layers to `learner.attention`.

    `qkv_format` is "sbhd", so that Megatron leaves the tokens [P, 1, ...] alone and applies rotary angles row by row;
    its "thd" branch would split and join the pack once per sequence, layer and projection.
    """

    segments: tuple[Segment, ...] = ()
    cu_seqlens: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))
    """int32[N+1] on the model's device: the same boundaries for variable-length kernels."""
    max_length: int = 0


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A micro-batch on the model's device. Row arrays keep the order of the micro-batch."""

    token_ids_P: Tensor
    """int64[1, P]"""
    positions_P: Tensor
    """int64[P]: position within its own sequence."""
    packing: Packing
    rows_R: Tensor
    """int64[R]: rows of the layout whose logits predict the targets."""
    targets_R: Tensor
    """int64[R]"""
    behaviour_R: Tensor
    """float32[R], nats"""
    teacher_R: Tensor | None
    """float32[R], nats; None where no teacher engine scores"""
    advantages_R: Tensor
    """float32[R]"""
    staleness_R: Tensor
    """int32[R], steps"""
    sequence_R: Tensor
    """int64[R], ascending: which sequence of the micro-batch a row belongs to."""
    topk_ids_RK: Tensor | None
    """int64[R, K]: the teacher's most likely ids, where the batch has them."""
    topk_logprobs_RK: Tensor | None
    """float32[R, K], nats: the teacher's."""
    weights_R: Tensor | None = None
    """float32[R]: how often a row counts in the loss; None: once each."""


def lay_out(batch: MicroBatch, *, multiple: int, slack: float, device: torch.device) -> PackedBatch:
    """Lay `batch` out and move it to `device`.

    `multiple` divides P (the tensor-parallel size under sequence parallelism). `slack` is the largest share of a
    sequence's slot that may be padding: 0 groups only equal lengths. An empty micro-batch becomes padding only, so
    that its rank still takes part in every collective.
    """
    lengths_N = np.diff(batch.cu_seqlens).astype(np.int64)
    order_N = np.argsort(-lengths_N, kind="stable")
    slots_N = _slots(lengths_N[order_N], slack)
    starts_N = np.concatenate([[0], np.cumsum(slots_N)]).astype(np.int64)
    used = int(starts_N[-1])
    total = max(multiple, -(-used // multiple) * multiple)
    place_T = _places(batch.cu_seqlens.astype(np.int64), lengths_N, order_N, starts_N)
    token_ids_P = np.full(total, PAD_ID, dtype=np.int64)
    token_ids_P[place_T] = batch.token_ids
    bounds = starts_N if total == used else np.append(starts_N, total)  # the tail is one more sequence, of padding
    positions_P = np.arange(total) - np.repeat(bounds[:-1], np.diff(bounds))
    scored = len(batch.teacher_logprobs) == len(batch.rows)
    packing = Packing(
        qkv_format="sbhd",
        segments=_segments(np.diff(bounds)),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)).to(device),
        max_length=int(np.diff(bounds).max()),
    )
    return PackedBatch(
        torch.from_numpy(token_ids_P)[None].to(device),
        torch.from_numpy(positions_P).to(device),
        packing,
        torch.from_numpy(place_T[batch.rows]).to(device),
        torch.from_numpy(batch.token_ids[batch.rows + 1].astype(np.int64)).to(device),
        torch.tensor(batch.behaviour_logprobs, device=device),
        torch.tensor(batch.teacher_logprobs, device=device) if scored else None,
        torch.tensor(batch.advantages, device=device),
        torch.tensor(batch.staleness, device=device),
        torch.from_numpy(np.searchsorted(batch.cu_seqlens, batch.rows, side="right") - 1).to(device),
        None if batch.topk is None else torch.from_numpy(batch.topk.ids.astype(np.int64)).to(device),
        None if batch.topk is None else torch.tensor(batch.topk.logprobs, device=device),
        None if batch.weights is None else torch.tensor(batch.weights, device=device),
    )


def _slots(lengths_N: Int64Array, slack: float) -> Int64Array:
    """int64[N]: each sequence's slot, the longest length that it may share a group with. Lengths are descending."""
    slot_of: dict[int, int] = {}
    slot = 0
    for length in sorted(set(lengths_N.tolist()), reverse=True):
        if length < slot * (1.0 - slack) or not slot:
            slot = length
        slot_of[length] = slot
    return np.array([slot_of[length] for length in lengths_N.tolist()], dtype=np.int64)


def _places(cu_seqlens: Int64Array, lengths_N: Int64Array, order_N: Int64Array, starts_N: Int64Array) -> Int64Array:
    """int64[T]: where each token of the micro-batch stands in the layout."""
    start_of_N = np.empty_like(lengths_N)
    start_of_N[order_N] = starts_N[:-1]
    return np.arange(int(cu_seqlens[-1])) + np.repeat(start_of_N - cu_seqlens[:-1], lengths_N)


def _segments(slots: Int64Array) -> tuple[Segment, ...]:
    """Runs of equal slots."""
    segments, start, first = [], 0, 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[first]:
            segments.append(Segment(start, end - first, int(slots[first])))
            start += (end - first) * int(slots[first])
            first = end
    return tuple(segments)
