"""Which tokens exist of which samples without being known to be held: the lists that the staleness bound rests on.

Paused (each actor) -> Owed.merged (barrier) -> Version, Drained -> Assembler.mark (intake)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np

from opd_async.transport.wire import Int32, Int64


class OwedSample(NamedTuple):
    """Response tokens [0, end) of a sample's attempt exist; some of them may still be on their way to the intake."""

    sample_id: int
    attempt: int
    end: int


class ListsOwed(Protocol):
    """A message that carries the three columns of an `Owed`."""

    @property
    def sample_ids(self) -> Int64: ...
    @property
    def attempts(self) -> Int32: ...
    @property
    def ends(self) -> Int32: ...


@dataclass(frozen=True, slots=True)
class Owed:
    """One `OwedSample` a row, in columns of equal length: `sample_ids` int64[n], `attempts` and `ends` int32[n]."""

    sample_ids: Int64
    attempts: Int32
    ends: Int32

    @classmethod
    def of(cls, samples: Iterable[OwedSample]) -> Self:
        """The list of these samples, in their order."""
        rows = np.array(list(samples), np.int64).reshape(-1, 3)
        return cls(rows[:, 0], rows[:, 1].astype(np.int32), rows[:, 2].astype(np.int32))

    @classmethod
    def merged(cls, lists: Iterable[ListsOwed]) -> Self:
        """One list of several, one behind the other. Each sample belongs to one actor, so none occurs twice."""
        parts = list(lists)
        if not parts:
            return cls.of(())
        return cls(
            np.concatenate([part.sample_ids for part in parts]),
            np.concatenate([part.attempts for part in parts]),
            np.concatenate([part.ends for part in parts]),
        )

    @classmethod
    def listed_in(cls, message: ListsOwed) -> Self:
        """The list that a `Paused`, `Version` or `Drained` carries. ValueError when its columns differ in length."""
        if not len(message.sample_ids) == len(message.attempts) == len(message.ends):
            raise ValueError(f"{type(message).__name__}: columns of different lengths")
        return cls(message.sample_ids, message.attempts, message.ends)

    def __iter__(self) -> Iterator[OwedSample]:
        """The rows."""
        columns = (self.sample_ids.tolist(), self.attempts.tolist(), self.ends.tolist())
        return (OwedSample(*row) for row in zip(*columns, strict=True))
