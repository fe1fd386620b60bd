"""A set of integers kept as disjoint half-open intervals: small when the members are nearly consecutive."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray


class IntervalSet:
    """Integers as sorted, disjoint, non-touching intervals [low, high)."""

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []
        for low, high in sorted(intervals):
            if self._highs and low <= self._highs[-1]:
                self._highs[-1] = max(high, self._highs[-1])
            elif low < high:
                self._lows.append(low)
                self._highs.append(high)

    def add(self, value: int) -> None:
        """Add one integer; adding a member again changes nothing."""
        at = bisect_right(self._lows, value)
        if at and value < self._highs[at - 1]:
            return
        joins_left = at > 0 and self._highs[at - 1] == value
        joins_right = at < len(self._lows) and self._lows[at] == value + 1
        if joins_left and joins_right:
            self._highs[at - 1] = self._highs.pop(at)
            self._lows.pop(at)
        elif joins_left:
            self._highs[at - 1] += 1
        elif joins_right:
            self._lows[at] = value
        else:
            self._lows.insert(at, value)
            self._highs.insert(at, value + 1)

    def fill(self, low: int, high: int) -> None:
        """Add all of [low, high)."""
        merged = IntervalSet([*self, (low, high)])
        self._lows, self._highs = merged._lows, merged._highs

    def __contains__(self, value: int) -> bool:
        at = bisect_right(self._lows, value)
        return at > 0 and value < self._highs[at - 1]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._lows, self._highs, strict=True))

    def __len__(self) -> int:
        """How many integers are in the set."""
        return sum(self._highs) - sum(self._lows)

    def first_absent(self, start: int = 0) -> int:
        """The smallest integer >= `start` that is not in the set."""
        at = bisect_right(self._lows, start)
        return self._highs[at - 1] if at and start < self._highs[at - 1] else start

    def to_array(self) -> NDArray[np.int64]:
        """int64[n, 2], one interval a row."""
        return np.array(list(self), dtype=np.int64).reshape(-1, 2)

    @classmethod
    def from_array(cls, array: NDArray[np.int64]) -> IntervalSet:
        """The set of the intervals int64[n, 2] that `to_array` has written."""
        return cls((int(low), int(high)) for low, high in array)
