"""Segments to packed micro-batches, dealt evenly to data-parallel ranks.

The prefix of a segment is forwarded again with it (its gradient is exact), so a sequence costs prompt + end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from opd_async.estimators.topk import TopK, join, split
from opd_async.scheduling.segments import Segment, joined
from opd_async.transport.messages import Train
from opd_async.transport.step_batch import MicroBatch, StepBatch, TeacherPrompts

Bin = list[Segment]
Number = TypeVar("Number", np.int32, np.int64, np.float32)


@dataclass(frozen=True, slots=True)
class Whole:
    """What an intake has to know of a step, or of a part, of which it packs a share."""

    loss_tokens: int
    """Trained tokens of all shares."""
    micro_batches: int
    """The largest number that a rank of any share gets."""


def whole_of(shares: Sequence[Sequence[Segment]], ranks: int, micro_batch_tokens: int) -> Whole:
    """What is packed for so many `ranks` of each share."""
    tokens = sum(segment.tokens for share in shares for segment in share)
    return Whole(tokens, max(len(_deal(share, ranks, micro_batch_tokens)) // ranks for share in shares))


def pack(
    segments: Sequence[Segment],
    version: int,
    ranks: int,
    micro_batch_tokens: int,
    *,
    part: int = 0,
    last: bool = True,
    whole: Whole | None = None,
) -> list[StepBatch]:
    """One `StepBatch` per data-parallel rank, all with the same number of micro-batches: of a step, or of its `part`.

    Longest first, each into the emptiest bin that it fits; a sequence longer than `micro_batch_tokens` gets a bin of
    its own. The result depends on the segments alone, not on their order. Where they are one share of several, `whole`
    says what all of them come to.
    """
    bins = _deal(segments, ranks, micro_batch_tokens)
    loss_tokens = sum(segment.tokens for segment in segments)
    if whole is not None:
        loss_tokens = whole.loss_tokens
        bins.extend([] for _ in range(ranks * whole.micro_batches - len(bins)))
    return [
        StepBatch(version, loss_tokens, tuple(micro_batch(group, version) for group in bins[rank::ranks]), part, last)
        for rank in range(ranks)
    ]


def _deal(segments: Sequence[Segment], ranks: int, micro_batch_tokens: int) -> list[Bin]:
    """Bins of segments, as many for each rank."""
    bins: list[Bin] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for segment in sorted(segments, key=lambda s: (-s.longest, s.sample_id)):
        length = segment.longest
        at = min(range(len(bins)), key=loads.__getitem__)
        if loads[at] and loads[at] + length > micro_batch_tokens:
            at = len(bins)
            bins.extend([] for _ in range(ranks))
            loads.extend([0] * ranks)
        bins[at].append(segment)
        loads[at] += length
    return bins


def micro_batch(segments: Sequence[Segment], version: int) -> MicroBatch:
    """Segments back to back; staleness counts from `version`."""
    lengths = np.array([len(segment.token_ids) for segment in segments], np.int32)
    cu_seqlens = _offsets(lengths)
    rows = [
        _positions(segment) + (offset + segment.prompt_tokens - 1)
        for segment, offset in zip(segments, cu_seqlens, strict=False)
    ]
    return MicroBatch(
        token_ids=_join([segment.token_ids for segment in segments], np.int32),
        cu_seqlens=cu_seqlens,
        rows=_join(rows, np.int32),
        behaviour_logprobs=_join([segment.behaviour_logprobs for segment in segments], np.float32),
        teacher_logprobs=_join([segment.teacher_logprobs for segment in segments], np.float32),
        advantages=_join([_advantages(segment) for segment in segments], np.float32),
        staleness=_join([version - segment.versions for segment in segments], np.int32),
        topk=join([segment.topk for segment in segments]),
        weights=_weights(segments),
        rewards=_rewards(segments),
        sample_ids=np.array([segment.sample_id for segment in segments], np.int64),
        teacher_prompts=_prompts(segments, [segment.teacher_prompt for segment in segments]),
        contrast_logprobs=joined([segment.contrast_logprobs for segment in segments]),
        contrast_prompts=_prompts(segments, [segment.contrast_prompt for segment in segments]),
    )


def _positions(segment: Segment) -> NDArray[np.int32]:
    """int32[n]: the response positions that are trained."""
    return np.arange(segment.start, segment.end, dtype=np.int32) if segment.positions is None else segment.positions


def _prompts(segments: Sequence[Segment], read: Sequence[NDArray[np.int32] | None]) -> TeacherPrompts | None:
    """What a teacher reads of these segments; None where that is the student's prompts."""
    if all(prompt is None for prompt in read):
        return None
    prompts = [np.zeros(0, np.int32) if prompt is None else prompt for prompt in read]
    return TeacherPrompts(
        np.array([segment.prompt_tokens for segment in segments], np.int32),
        np.array([len(prompt) for prompt in prompts], np.int32),
        _join(prompts, np.int32),
    )


def mean_over_responses(segments: Sequence[Segment]) -> None:
    """Weigh the tokens of whole responses so that the mean over the step's tokens is one over its responses, each the
    mean over its own tokens."""
    tokens = sum(segment.tokens for segment in segments)
    for segment in segments:
        segment.weight = tokens / (len(segments) * segment.tokens)


def _weights(segments: Sequence[Segment]) -> NDArray[np.float32] | None:
    if all(segment.weight is None for segment in segments):
        return None
    return _join([np.full(s.tokens, s.weight or 1.0, np.float32) for s in segments], np.float32)


def _rewards(segments: Sequence[Segment]) -> NDArray[np.float32] | None:
    rewards = [segment.rewards for segment in segments if segment.rewards is not None]
    return _join(rewards, np.float32) if rewards else None


def _advantages(segment: Segment) -> NDArray[np.float32]:
    return segment.advantages if segment.advantages is not None else np.zeros(segment.tokens, np.float32)


def _join(parts: Sequence[NDArray[Any]], dtype: type[Number]) -> NDArray[Number]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def to_message(batch: StepBatch) -> Train:
    """The wire form of one rank's step or part."""
    mbs = batch.micro_batches
    topk = join([mb.topk for mb in mbs])
    none = [TeacherPrompts.none(len(mb.cu_seqlens) - 1) for mb in mbs]
    read = [mb.teacher_prompts or nothing for mb, nothing in zip(mbs, none, strict=True)]
    beside = [mb.contrast_prompts or nothing for mb, nothing in zip(mbs, none, strict=True)]
    others, contrasts = (any(one is not nothing for one, nothing in zip(a, none, strict=True)) for a in (read, beside))
    prompts = [np.maximum(a.prompt_lengths_N, b.prompt_lengths_N) for a, b in zip(read, beside, strict=True)]
    return Train(
        version=batch.version,
        part=batch.part,
        last=batch.last,
        loss_tokens=batch.loss_tokens,
        mb_tokens=np.array([len(mb.token_ids) for mb in mbs], np.int32),
        mb_sequences=np.array([len(mb.cu_seqlens) - 1 for mb in mbs], np.int32),
        mb_rows=np.array([len(mb.rows) for mb in mbs], np.int32),
        token_ids=_join([mb.token_ids for mb in mbs], np.int32),
        sequence_lengths=_join([np.diff(mb.cu_seqlens) for mb in mbs], np.int32),
        rows=_join([mb.rows for mb in mbs], np.int32),
        behaviour_logprobs=_join([mb.behaviour_logprobs for mb in mbs], np.float32),
        teacher_logprobs=_join([mb.teacher_logprobs for mb in mbs], np.float32),
        advantages=_join([mb.advantages for mb in mbs], np.float32),
        staleness=_join([mb.staleness for mb in mbs], np.int32),
        topk_ids=topk.ids if topk is not None else None,
        topk_logprobs=topk.logprobs if topk is not None else None,
        weights=_join([mb.weights for mb in mbs if mb.weights is not None], np.float32)
        if any(mb.weights is not None for mb in mbs)
        else None,
        rewards=_join([mb.rewards for mb in mbs if mb.rewards is not None], np.float32)
        if any(mb.rewards is not None for mb in mbs)
        else None,
        sample_ids=_join([mb.sample_ids for mb in mbs if mb.sample_ids is not None], np.int64)
        if any(mb.sample_ids is not None for mb in mbs)
        else None,
        prompt_lengths=_join(prompts, np.int32) if others or contrasts else None,
        teacher_prompt_lengths=_join([one.lengths_N for one in read], np.int32) if others else None,
        teacher_prompts=_join([one.token_ids for one in read], np.int32) if others else None,
        contrast_logprobs=joined([mb.contrast_logprobs for mb in mbs]),
        contrast_prompt_lengths=_join([one.lengths_N for one in beside], np.int32) if contrasts else None,
        contrast_prompts=_join([one.token_ids for one in beside], np.int32) if contrasts else None,
    )


def from_message(train: Train) -> StepBatch:
    """Inverse of `to_message`; the arrays are views of the message."""
    tokens = np.split(train.token_ids, np.cumsum(train.mb_tokens)[:-1])
    sequence_cuts = np.cumsum(train.mb_sequences)[:-1]
    lengths = np.split(train.sequence_lengths, sequence_cuts)
    cuts = np.cumsum(train.mb_rows)[:-1]
    rows, staleness = (np.split(values, cuts) for values in (train.rows, train.staleness))
    by_row = (train.behaviour_logprobs, train.teacher_logprobs, train.advantages)
    behaviour, teacher, advantages = (np.split(values, cuts) for values in by_row)
    weights, contrast = (
        [None] * len(rows) if values is None else np.split(values, cuts)
        for values in (train.weights, train.contrast_logprobs)
    )
    rewards = [None] * len(rows) if train.rewards is None else np.split(train.rewards, cuts)
    samples = [None] * len(rows) if train.sample_ids is None else np.split(train.sample_ids, sequence_cuts)
    read = _split_prompts(train, sequence_cuts, train.teacher_prompt_lengths, train.teacher_prompts)
    beside = _split_prompts(train, sequence_cuts, train.contrast_prompt_lengths, train.contrast_prompts)
    topk = split(TopK.of(train.topk_ids, train.topk_logprobs), train.mb_rows.tolist())
    micro_batches = tuple(
        MicroBatch(
            token_ids=tokens[i],
            cu_seqlens=_offsets(lengths[i]),
            rows=rows[i],
            behaviour_logprobs=behaviour[i],
            teacher_logprobs=teacher[i],
            advantages=advantages[i],
            staleness=staleness[i],
            topk=topk[i],
            weights=weights[i],
            rewards=rewards[i],
            sample_ids=samples[i],
            teacher_prompts=read[i],
            contrast_logprobs=contrast[i],
            contrast_prompts=beside[i],
        )
        for i in range(len(train.mb_tokens))
    )
    return StepBatch(train.version, train.loss_tokens, micro_batches, train.part, train.last)


def _split_prompts(
    train: Train, sequence_cuts: NDArray[Any], lengths: NDArray[np.int32] | None, ids: NDArray[np.int32] | None
) -> Sequence[TeacherPrompts | None]:
    """The prompts that a teacher in the learner reads, by micro-batch, of their lengths and their ids."""
    prompts = train.prompt_lengths
    if prompts is None or lengths is None or ids is None:
        return [None] * len(train.mb_tokens)
    parts = np.split(lengths, sequence_cuts)
    tokens = np.split(ids, np.cumsum([int(part.sum()) for part in parts])[:-1])
    found = zip(np.split(prompts, sequence_cuts), parts, tokens, strict=True)
    return [TeacherPrompts(*one) if one[1].any() else None for one in found]


def _offsets(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
