"""Lay a packed micro-batch out for attention: sequences of similar length side by side, so that each group of them is
one batched attention call instead of one call per sequence.

    T  tokens of the micro-batch as it came     P  tokens as laid out on this rank (padding included)
    N  sequences                                R  trained rows, with K ids of the teacher's top-k each
                                                O  those of them that this rank holds

Padding always stands to the right of a sequence, where causal attention never looks, so no mask is needed. With context
parallelism each rank holds a part of every sequence (`learner.context`), else O = R.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from opd_async.learner.model.context import Int64Array, Piece, whole, zigzag
from opd_async.transport.step_batch import MicroBatch

PAD_ID = 0


@dataclass
class Packing(PackedSeqParams):
    """What travels through Megatron's layers to `learner.attention`.

    `qkv_format` is "sbhd", so that Megatron leaves the tokens [P, 1, ...] alone and applies rotary angles row by row;
    its "thd" branch would split and join the pack once per sequence, layer and projection.
    """

    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A micro-batch on the model's device. Row arrays keep the order of the micro-batch."""

    token_ids_P: Tensor
    """int64[1, P]"""
    positions_P: Tensor
    """int64[P]: position within its own sequence."""
    packing: Packing
    rows_O: Tensor
    """int64[O]: tokens of the layout whose logits predict the targets."""
    own_O: Tensor | None
    """int64[O], ascending: which of the R rows these are; None where they are all."""
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
    reference_R: Tensor | None = None
    """float32[R], nats: the reference model's, where there is one."""
    plain_R: Tensor | None = None
    """float32[R], nats: the teacher's behind the student's prompts, in steps that report it."""
    contrast_R: Tensor | None = None
    """float32[R], nats: the teacher's behind the prompts of the contrast, where there are some."""
    frequent_R: Tensor | None = None
    """bool[R]: whether a target is one of the micro-batch's most frequent ones; None where nobody asks."""
    rewards_R: NDArray[np.float32] | None = None
    """float32[R], on the host: earned with each row, NaN where nothing is known; None unless the learner needs them."""
    sample_ids_N: NDArray[np.int64] | None = None
    """int64[N], on the host: whose each sequence is; None where there are no samples."""

    def own(self, values_R: Tensor) -> Tensor:
        """Of values [R, ...], those of this rank's rows: [O, ...]."""
        return values_R if self.own_O is None else values_R[self.own_O]


def lay_out(
    batch: MicroBatch,
    *,
    multiple: int,
    slack: float,
    device: torch.device,
    context: tuple[int, int] = (0, 1),
    frequent: int = 0,
) -> PackedBatch:
    """Lay `batch` out and move it to `device`.

    `multiple` divides P (the tensor-parallel size under sequence parallelism). `slack` is the largest share of a
    sequence's slot that may be padding: 0 groups only equal lengths. `context` is this rank's place in its context
    group and the group's size. `frequent` is how many of the most frequent targets are marked. An empty micro-batch
    becomes padding only, so that its rank still takes part in every collective.
    """
    lengths_N = np.diff(batch.cu_seqlens).astype(np.int64)
    order_N = np.argsort(-lengths_N, kind="stable")
    chunks = 1 if context[1] == 1 else 2 * context[1]
    slots_N = _slots(lengths_N[order_N], slack, chunks)
    starts_N = np.cumsum(slots_N) - slots_N
    place_T = _places(batch.cu_seqlens.astype(np.int64), lengths_N, order_N, starts_N)
    used, step = int(slots_N.sum()), multiple * chunks
    total = max(step, -(-used // step) * step)
    if total > used:  # the tail is one more sequence, of padding
        slots_N, starts_N = np.append(slots_N, total - used), np.append(starts_N, used)
    token_ids = np.full(total, PAD_ID, dtype=np.int64)
    token_ids[place_T] = batch.token_ids
    positions = np.arange(total) - np.repeat(starts_N, slots_N)
    held_P, pieces = zigzag(slots_N, *context, device) if chunks > 1 else (None, whole(slots_N, device))
    rows_O, own_O = place_T[batch.rows], None
    if held_P is not None:
        token_ids, positions = token_ids[held_P], positions[held_P]
        rows_O, own_O = _held_rows(rows_O, held_P, total)
    return PackedBatch(
        token_ids_P=torch.from_numpy(token_ids)[None].to(device),
        positions_P=torch.from_numpy(positions).to(device),
        packing=Packing(qkv_format="sbhd", pieces=pieces),
        rows_O=torch.from_numpy(rows_O).to(device),
        own_O=None if own_O is None else torch.from_numpy(own_O).to(device),
        targets_R=torch.from_numpy(batch.token_ids[batch.rows + 1].astype(np.int64)).to(device),
        behaviour_R=torch.tensor(batch.behaviour_logprobs, device=device),
        teacher_R=_scores(batch.teacher_logprobs, batch, device),
        contrast_R=_scores(batch.contrast_logprobs, batch, device),
        advantages_R=torch.tensor(batch.advantages, device=device),
        staleness_R=torch.tensor(batch.staleness, device=device),
        sequence_R=torch.from_numpy(np.searchsorted(batch.cu_seqlens, batch.rows, side="right") - 1).to(device),
        topk_ids_RK=None if batch.topk is None else torch.from_numpy(batch.topk.ids.astype(np.int64)).to(device),
        topk_logprobs_RK=None if batch.topk is None else torch.tensor(batch.topk.logprobs, device=device),
        weights_R=None if batch.weights is None else torch.tensor(batch.weights, device=device),
        rewards_R=batch.rewards,
        sample_ids_N=batch.sample_ids,
        frequent_R=torch.from_numpy(_frequent(batch, frequent)).to(device) if frequent else None,
    )


def _scores(logprobs: NDArray[np.float32] | None, batch: MicroBatch, device: torch.device) -> Tensor | None:
    """float32[R]; None where there are rows, and no scores of them: without rows there is nothing that a loss lacks."""
    found = np.zeros(0, np.float32) if logprobs is None else logprobs
    return torch.tensor(found, device=device) if len(found) == len(batch.rows) else None


def _frequent(batch: MicroBatch, most: int) -> NDArray[np.bool_]:
    """bool[R]: whether a target is one of the `most` most frequent ones."""
    targets = batch.token_ids[batch.rows + 1]
    ids, counts = np.unique(targets, return_counts=True)
    return np.isin(targets, ids[np.argsort(-counts, kind="stable")[:most]])


def _held_rows(rows_R: Int64Array, held_P: Int64Array, total: int) -> tuple[Int64Array, Int64Array]:
    """int64[O] each: where this rank's rows stand among the tokens that it holds, and which of all rows they are."""
    here = np.full(total, -1, np.int64)
    here[held_P] = np.arange(len(held_P))
    places_R = here[rows_R]
    own_O = np.flatnonzero(places_R >= 0)
    return places_R[own_O], own_O


def _slots(lengths_N: Int64Array, slack: float, multiple: int) -> Int64Array:
    """int64[N]: each sequence's slot, the longest length that it may share a group with, rounded up to a multiple.

    Lengths are descending.
    """
    slot_of: dict[int, int] = {}
    slot = 0
    for length in sorted(set(lengths_N.tolist()), reverse=True):
        if length < slot * (1.0 - slack) or not slot:
            slot = length
        slot_of[length] = -(-slot // multiple) * multiple
    return np.array([slot_of[length] for length in lengths_N.tolist()], dtype=np.int64)


def _places(cu_seqlens: Int64Array, lengths_N: Int64Array, order_N: Int64Array, starts_N: Int64Array) -> Int64Array:
    """int64[T]: where each token of the micro-batch stands in the layout."""
    start_of_N = np.empty_like(lengths_N)
    start_of_N[order_N] = starts_N
    return np.arange(int(cu_seqlens[-1])) + np.repeat(start_of_N - cu_seqlens[:-1], lengths_N)
