"""Laying a micro-batch out keeps every token, position, row and target."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_learner import EMPTY, micro_batch

from learner.layout import PAD_ID, lay_out

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(2, 50), min_size=1, max_size=12),
    multiple=st.sampled_from([1, 2, 4]),
    slack=st.sampled_from([0.0, 0.125, 0.5]),
)
def test_a_layout_holds_the_same_sequences(lengths: list[int], multiple: int, slack: float) -> None:
    batch = micro_batch(lengths, prompt=1)
    packed = lay_out(batch, multiple=multiple, slack=slack, device=CPU)
    ids, positions = packed.token_ids_P[0].numpy(), packed.positions_P.numpy()
    assert len(ids) % multiple == 0
    # every segment covers its own tokens, the slots follow each other without gaps
    end = 0
    slots = []
    for segment in packed.packing.segments:
        assert segment.start == end
        slots += [(end + i * segment.length, segment.length) for i in range(segment.count)]
        end += segment.count * segment.length
    assert end == len(ids)
    assert packed.packing.max_length == max(length for _, length in slots)
    assert packed.packing.cu_seqlens.tolist() == [start for start, _ in slots] + [end]
    for start, length in slots:
        assert positions[start : start + length].tolist() == list(range(length))
    # rows find their own prefix and their own target
    for index, row in enumerate(packed.rows_R.tolist()):
        original = int(batch.rows[index])
        start = int(batch.cu_seqlens[np.searchsorted(batch.cu_seqlens, original, side="right") - 1])
        offset = original - start
        assert positions[row] == offset
        assert ids[row - offset : row + 1].tolist() == batch.token_ids[start : original + 1].tolist()
        assert packed.targets_R[index] == batch.token_ids[original + 1]
    # padding: within the slack of each sequence, and less than a multiple at the end
    assert len(ids) <= sum(int(length / (1.0 - slack)) for length in lengths) + multiple
    if slack == 0.0:
        assert len(ids) - sum(lengths) < multiple


def test_similar_lengths_share_one_attention_call() -> None:
    packed = lay_out(micro_batch([41] * 100 + [40] * 50 + [38] * 50), multiple=1, slack=0.125, device=CPU)
    assert [(s.count, s.length) for s in packed.packing.segments] == [(200, 41)]


def test_an_empty_micro_batch_is_padding_without_rows() -> None:
    packed = lay_out(EMPTY, multiple=2, slack=0.125, device=CPU)
    assert packed.token_ids_P.tolist() == [[PAD_ID, PAD_ID]]
    assert len(packed.rows_R) == len(packed.targets_R) == 0
