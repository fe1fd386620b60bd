"""Flat shares of a tensor as boxes, and what ranks write of their states."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_async.learner.checkpoints.states import boxes

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(SHAPES, st.data())
def test_boxes_are_the_elements_in_order(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(start, whole.numel()))
    found = list(boxes(shape, start, end))
    parts = [whole[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for box in found]
    assert [element for part in parts for element in part.flatten().tolist()] == list(range(start, end))
    assert len(found) <= 2 * len(shape) - 1 and all(math.prod(box.shape) for box in found)


def test_a_share_that_ends_in_a_row_has_its_head_its_rows_and_its_tail() -> None:
    assert list(boxes((6, 4), 3, 18)) == [((0, 3), (1, 1)), ((1, 0), (3, 4)), ((4, 0), (1, 2))]
    assert list(boxes((6, 4), 5, 7)) == [((1, 1), (1, 2))]
    assert list(boxes((6, 4), 0, 24)) == [((0, 0), (6, 4))] and list(boxes((6, 4), 8, 8)) == []
