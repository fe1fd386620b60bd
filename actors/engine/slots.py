"""Keep the books of the token pool: which KV slots are free. Pure, no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


class SlotPool:
    """Slots 1..capacity of the KV pool, one token each. Slot 0 is never handed out: padding reads it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._stack: IntArray = np.arange(capacity, 0, -1, dtype=np.int32)
        self._size = capacity

    @property
    def free_count(self) -> int:
        """The number of slots that can be taken now."""
        return self._size

    def take(self, count: int) -> IntArray:
        """Hand out `count` slots, int32 [count]. Raises ValueError when fewer are free."""
        if count > self._size:
            raise ValueError(f"{count} KV slots asked for, {self._size} of {self.capacity} free")
        self._size -= count
        return self._stack[self._size : self._size + count].copy()

    def give_back(self, slots: IntArray) -> None:
        """Return slots that were taken. Raises ValueError when more come back than went out."""
        end = self._size + len(slots)
        if end > self.capacity:
            raise ValueError(f"{end - self.capacity} KV slots came back twice")
        self._stack[self._size : end] = slots
        self._size = end
