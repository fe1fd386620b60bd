"""The lists of tokens that exist, from the actors to the intake."""

from __future__ import annotations

import numpy as np
import pytest

from opd_async.transport import messages as m
from opd_async.transport.owed import Owed, OwedSample
from opd_async.transport.wire import decode, encode


def test_a_list_survives_the_way_over_the_wire() -> None:
    samples = [OwedSample(2**40, 3, 17), OwedSample(5, 0, 0)]
    owed = Owed.of(samples)
    assert (owed.sample_ids.dtype, owed.attempts.dtype, owed.ends.dtype) == (np.int64, np.int32, np.int32)
    arrived = decode(encode(m.Version(4, owed.sample_ids, owed.attempts, owed.ends)))
    assert list(Owed.listed_in(arrived)) == samples


def test_lists_are_merged_in_order() -> None:
    first, second = Owed.of([OwedSample(1, 0, 4)]), Owed.of([OwedSample(2, 1, 8), OwedSample(3, 0, 2)])
    assert list(Owed.merged([first, second])) == [*first, *second]
    assert list(Owed.merged([])) == []


def test_columns_of_different_lengths_are_refused() -> None:
    one, two = np.zeros(1, np.int32), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="Drained"):
        Owed.listed_in(m.Drained(4, np.zeros(2, np.int64), one, two))
