"""IntervalSet against a plain set."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.scheduling.intervals import IntervalSet

NUMBERS = st.integers(0, 40)
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8)


def assert_canonical(intervals: IntervalSet) -> None:
    """Sorted, not empty, not touching."""
    bounds = list(intervals)
    assert all(low < high for low, high in bounds)
    assert all(left[1] < right[0] for left, right in itertools.pairwise(bounds))


@settings(max_examples=200, deadline=None)
@given(PAIRS, st.lists(NUMBERS, max_size=60))
def test_behaves_like_a_set(pairs: list[tuple[int, int]], added: list[int]) -> None:
    intervals = IntervalSet(pairs)
    model = {number for low, high in pairs for number in range(low, high)}
    for number in added:
        intervals.add(number)
        model.add(number)
        assert_canonical(intervals)
    assert_canonical(intervals)
    assert {number for low, high in intervals for number in range(low, high)} == model
    assert len(intervals) == len(model)
    for number in range(-1, 43):
        assert (number in intervals) == (number in model)
        absent = next(n for n in range(number, 100) if n not in model)
        assert intervals.first_absent(number) == absent


@settings(max_examples=100, deadline=None)
@given(PAIRS, NUMBERS, NUMBERS)
def test_a_whole_interval_is_added(pairs: list[tuple[int, int]], low: int, high: int) -> None:
    intervals = IntervalSet(pairs)
    model = {number for pair in [*pairs, (low, high)] for number in range(*pair)}
    intervals.fill(low, high)
    assert_canonical(intervals)
    assert {number for pair in intervals for number in range(*pair)} == model


@settings(max_examples=100, deadline=None)
@given(PAIRS)
def test_survives_the_array(pairs: list[tuple[int, int]]) -> None:
    intervals = IntervalSet(pairs)
    array = intervals.to_array()
    assert array.dtype == np.int64
    assert array.shape == (len(list(intervals)), 2)
    assert list(IntervalSet.from_array(array)) == list(intervals)


def test_consecutive_members_are_one_interval_in_any_order() -> None:
    intervals = IntervalSet()
    for number in np.random.default_rng(0).permutation(1000):
        intervals.add(int(number))
    assert list(intervals) == [(0, 1000)]
    assert intervals.first_absent() == 1000
