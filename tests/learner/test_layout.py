"""Laying a micro-batch out keeps every token, position, row and target."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_learner import EMPTY, micro_batch

from opd_async.learner.model.layout import PAD_ID, lay_out

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
    (piece,) = packed.packing.pieces
    assert piece.keys is None and packed.own_O is None
    end = 0
    slots = []
    for segment in piece.segments:
        assert segment.start == segment.first_key == end and segment.length == segment.reach
        slots += [(end + i * segment.length, segment.length) for i in range(segment.count)]
        end += segment.count * segment.length
    assert end == len(ids)
    assert piece.longest == (max(length for _, length in slots),) * 2
    assert piece.query_bounds.tolist() == piece.key_bounds.tolist() == [start for start, _ in slots] + [end]
    for start, length in slots:
        assert positions[start : start + length].tolist() == list(range(length))
    # rows find their own prefix and their own target
    for index, row in enumerate(packed.rows_O.tolist()):
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
    assert [(s.count, s.length) for s in packed.packing.pieces[0].segments] == [(200, 41)]


def test_an_empty_micro_batch_is_padding_without_rows() -> None:
    packed = lay_out(EMPTY, multiple=2, slack=0.125, device=CPU)
    assert packed.token_ids_P.tolist() == [[PAD_ID, PAD_ID]]
    assert len(packed.rows_O) == len(packed.targets_R) == 0


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=8),
    size=st.sampled_from([2, 3]),
    multiple=st.sampled_from([1, 2]),
)
def test_a_context_group_holds_every_token_and_sees_its_prefix(lengths: list[int], size: int, multiple: int) -> None:
    batch = micro_batch(lengths, prompt=1)
    parts = [lay_out(batch, multiple=multiple, slack=0.125, device=CPU, context=(rank, size)) for rank in range(size)]
    assert sorted(row for part in parts if part.own_O is not None for row in part.own_O.tolist()) == list(
        range(len(batch.rows))
    )
    gathered = [
        (token, position)
        for part in parts
        for token, position in zip(part.token_ids_P[0].tolist(), part.positions_P.tolist(), strict=True)
    ]
    seen = 0
    for part in parts:
        assert len(part.positions_P) % multiple == 0 and len(part.positions_P) == len(gathered) // size
        assert part.own_O is not None
        for place, row in zip(part.rows_O.tolist(), part.own_O.tolist(), strict=True):
            assert part.token_ids_P[0, place] == batch.token_ids[batch.rows[row]]
        for piece in part.packing.pieces:
            assert piece.keys is not None
            for segment in piece.segments:
                for n in range(segment.count):
                    start, first = segment.start + n * segment.length, segment.first_key + n * segment.reach
                    keys = [gathered[key] for key in piece.keys[first : first + segment.reach].tolist()]
                    # keys are a sequence from its first token on, queries its last ones
                    assert [position for _, position in keys] == list(range(segment.reach))
                    own = slice(start, start + segment.length)
                    assert part.token_ids_P[0, own].tolist() == [token for token, _ in keys[-segment.length :]]
                    seen += segment.length
    assert seen == len(gathered)
