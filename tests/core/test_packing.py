"""Packing: nothing is lost, rows predict their targets, and ranks work in step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from opd_async.estimators.topk import TopK
from opd_async.scheduling.packing import from_message, mean_over_responses, micro_batch, pack, to_message
from opd_async.scheduling.segments import Segment
from opd_async.transport.step_batch import MicroBatch, StepBatch, TeacherPrompts
from opd_async.transport.wire import decode, encode

VERSION = 7


def segment(
    sample_id: int,
    prompt: int,
    start: int,
    count: int,
    k: int = 0,
    rewarded: bool = False,
    read: bool = False,
    contrast: str = "",
) -> Segment:
    """Every token, logprob, version and top-k tells which sample and position it belongs to.

    `read`: the teacher reads another prompt than the student, but for every fourth sample. `contrast`: it has scored
    behind another, "scores", or is to do so, "prompts".
    """
    end = start + count
    rng = np.random.default_rng(sample_id)
    return Segment(
        sample_id=sample_id,
        prompt_tokens=prompt,
        start=start,
        end=end,
        complete=bool(rng.integers(2)),
        token_ids=(1000 * sample_id + np.arange(prompt + end)).astype(np.int32),
        behaviour_logprobs=rng.uniform(-5, 0, count).astype(np.float32),
        teacher_logprobs=rng.uniform(-5, 0, count).astype(np.float32),
        versions=np.sort(rng.integers(3, VERSION + 1, count)).astype(np.int32),
        topk=topk_of(1000 * sample_id + prompt + np.arange(start, end), k) if k else None,
        rewards=_rewards(sample_id, count) if rewarded else None,
        teacher_prompt=_read(sample_id) if read and sample_id % 4 else None,
        contrast_logprobs=rng.uniform(-5, 0, count).astype(np.float32) if contrast == "scores" else None,
        contrast_prompt=_read(sample_id + 3) if contrast == "prompts" else None,
    )


def _read(sample_id: int) -> NDArray[np.int32]:
    """What the teacher reads in place of the sample's prompt."""
    return (-1000 * sample_id - np.arange(sample_id % 7 + 1)).astype(np.int32)


def _rewards(sample_id: int, count: int) -> NDArray[np.float32]:
    """Every third response has none."""
    return (sample_id + np.arange(count) if sample_id % 3 else np.full(count, np.nan)).astype(np.float32)


def topk_of(targets: NDArray[np.int64], k: int) -> TopK:
    """A made-up top-k of each target: the target and what follows it."""
    ids = (targets[:, None] + np.arange(k)).astype(np.int32)
    return TopK(ids, -ids.astype(np.float32))


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Segment], int, int]:
    """(segments, ranks, micro_batch_tokens)"""
    sizes = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 20), st.integers(1, 20)), max_size=12))
    k = draw(st.sampled_from([0, 3]))
    rewarded, read = draw(st.booleans()), draw(st.booleans())
    contrast = draw(st.sampled_from(["", "scores", "prompts"]))
    segments = [segment(index, *size, k, rewarded, read, contrast) for index, size in enumerate(sizes)]
    return segments, draw(st.integers(1, 4)), draw(st.integers(1, 60))


def sequences(mb: MicroBatch) -> list[slice]:
    return [slice(a, b) for a, b in zip(mb.cu_seqlens[:-1], mb.cu_seqlens[1:], strict=True)]


def trained(batches: Sequence[StepBatch]) -> list[tuple[int, float, float, int]]:
    """(target, behaviour, teacher, staleness) of every row, by brute force."""
    rows = []
    for mb in (mb for batch in batches for mb in batch.micro_batches):
        for i, row in enumerate(mb.rows.tolist()):
            inside = [s for s in sequences(mb) if s.start <= row < s.stop - 1]
            assert len(inside) == 1, "a row and its target lie in one sequence"
            behaviour, teacher = float(mb.behaviour_logprobs[i]), float(mb.teacher_logprobs[i])
            rows.append((int(mb.token_ids[row + 1]), behaviour, teacher, int(mb.staleness[i])))
    return sorted(rows)


def wanted(segments: Sequence[Segment]) -> list[tuple[int, float, float, int]]:
    return sorted(
        (
            int(s.token_ids[s.prompt_tokens + s.start + i]),
            float(s.behaviour_logprobs[i]),
            float(s.teacher_logprobs[i]),
            VERSION - int(s.versions[i]),
        )
        for s in segments
        for i in range(s.end - s.start)
    )


def read_in(mb: MicroBatch) -> list[tuple[int, list[int]] | None]:
    """Of each sequence the length of the prompt that the teacher does not read, and what it reads in its place."""
    if mb.teacher_prompts is None:
        return [None] * len(sequences(mb))
    ids, found = mb.teacher_prompts.token_ids.tolist(), list[tuple[int, list[int]] | None]()
    for own, length in zip(
        mb.teacher_prompts.prompt_lengths_N.tolist(), mb.teacher_prompts.lengths_N.tolist(), strict=True
    ):
        found.append((own, ids[:length]) if length else None)
        ids = ids[length:]
    assert not ids
    return found


def assert_same(left: StepBatch, right: StepBatch) -> None:
    assert (left.version, left.loss_tokens) == (right.version, right.loss_tokens)
    assert len(left.micro_batches) == len(right.micro_batches)
    for one, two in zip(left.micro_batches, right.micro_batches, strict=True):
        for a, b in zip(one.topk or (), two.topk or (), strict=bool(len(one.rows))):
            np.testing.assert_array_equal(a, b)
        for field in dataclasses.fields(MicroBatch):
            a, b = getattr(one, field.name), getattr(two, field.name)
            optional = field.name in ("weights", "rewards", "contrast_logprobs") and not len(one.rows)
            if isinstance(a, TeacherPrompts):
                assert isinstance(b, TeacherPrompts)
                for c, d in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True):
                    assert c.dtype == d.dtype
                    np.testing.assert_array_equal(c, d)
                continue
            if field.name != "topk" and not optional and (a is not None or b is not None):
                assert a.dtype == b.dtype, field.name
                np.testing.assert_array_equal(a, b, field.name)


@settings(max_examples=120, deadline=None)
@given(steps())
def test_every_row_once_and_ranks_in_step(step: tuple[list[Segment], int, int]) -> None:
    segments, ranks, micro_batch_tokens = step
    batches = pack(segments, VERSION, ranks, micro_batch_tokens)
    assert len(batches) == ranks
    assert len({len(batch.micro_batches) for batch in batches}) == 1
    assert {batch.loss_tokens for batch in batches} == {sum(s.end - s.start for s in segments)}
    assert trained(batches) == wanted(segments)
    for mb in (mb for batch in batches for mb in batch.micro_batches):
        assert len(mb.token_ids) <= micro_batch_tokens or len(sequences(mb)) == 1
        assert np.all(np.diff(mb.rows) > 0)
        if mb.topk is not None:
            assert all(len(array) == len(mb.rows) for array in mb.topk)
            np.testing.assert_array_equal(mb.topk.ids[:, 0], mb.token_ids[mb.rows + 1])
        assert (mb.topk is None) == (not len(mb.rows) or segments[0].topk is None)
        assert not mb.advantages.any()
        assert (mb.rewards is None) == (not len(mb.rows) or segments[0].rewards is None)
        for piece in sequences(mb):
            sample_id = int(mb.token_ids[piece.start]) // 1000
            if mb.rewards is not None:
                inside = (mb.rows >= piece.start) & (mb.rows < piece.stop)
                np.testing.assert_equal(mb.rewards[inside], _rewards(sample_id, int(inside.sum())))
            np.testing.assert_array_equal(mb.token_ids[piece], segments[sample_id].token_ids)
        assert read_in(mb) == [
            None if s.teacher_prompt is None else (s.prompt_tokens, s.teacher_prompt.tolist())
            for s in (segments[int(mb.token_ids[piece.start]) // 1000] for piece in sequences(mb))
        ]


@settings(max_examples=60, deadline=None)
@given(steps(), st.randoms(use_true_random=False))
def test_the_result_does_not_depend_on_the_order(step: tuple[list[Segment], int, int], random: object) -> None:
    segments, ranks, micro_batch_tokens = step
    shuffled = list(segments)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for one, two in zip(
        pack(segments, VERSION, ranks, micro_batch_tokens),
        pack(shuffled, VERSION, ranks, micro_batch_tokens),
        strict=True,
    ):
        assert_same(one, two)


@settings(max_examples=60, deadline=None)
@given(steps())
def test_survives_the_wire(step: tuple[list[Segment], int, int]) -> None:
    for batch in pack(step[0], VERSION, step[1], step[2]):
        frames = [bytes(frame) for frame in encode(to_message(batch))]
        assert_same(batch, from_message(decode(frames)))


def test_the_first_row_predicts_the_first_response_token() -> None:
    mb = micro_batch([segment(1, 3, 0, 2), segment(2, 2, 1, 2)], VERSION)
    assert mb.token_ids.tolist() == [1000, 1001, 1002, 1003, 1004, 2000, 2001, 2002, 2003, 2004]
    assert mb.cu_seqlens.tolist() == [0, 5, 10]
    assert mb.rows.tolist() == [2, 3, 7, 8]
    assert mb.token_ids[mb.rows + 1].tolist() == [1003, 1004, 2003, 2004]


def test_a_step_without_segments_keeps_every_rank_in_step() -> None:
    for batch in pack([], VERSION, 3, 16):
        assert batch.loss_tokens == 0
        (mb,) = batch.micro_batches
        assert (len(mb.token_ids), len(mb.rows), mb.cu_seqlens.tolist()) == (0, 0, [0])
        assert_same(batch, from_message(decode([bytes(frame) for frame in encode(to_message(batch))])))


def test_ranks_share_the_load() -> None:
    segments = [segment(i, 2, 0, 30) for i in range(16)]
    loads = [sum(len(mb.token_ids) for mb in b.micro_batches) for b in pack(segments, VERSION, 4, 64)]
    assert loads == [128] * 4


def test_a_mean_over_responses_weighs_their_tokens() -> None:
    """Each response counts alike, whatever its length, and a token once in the mean; over the wire too."""
    segments = [segment(1, 2, 0, 2), segment(2, 2, 0, 6), segment(3, 2, 0, 1)]
    assert micro_batch(segments, VERSION).weights is None
    mean_over_responses(segments)
    (batch, *others) = pack(segments, VERSION, 2, 4)
    received = [from_message(decode([bytes(frame) for frame in encode(to_message(one))])) for one in (batch, *others)]
    everything = [w for one in received for mb in one.micro_batches for w in _weights_of(mb)]
    assert len(everything) == 9 and sum(everything) == 9.0
    assert [everything.count(w) for w in (0.5, 1.5, 3.0)] == [6, 2, 1]


def _weights_of(mb: MicroBatch) -> list[float]:
    assert mb.weights is not None
    return [float(weight) for weight in mb.weights]
