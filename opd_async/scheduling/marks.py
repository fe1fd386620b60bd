"""Which weight versions are settled: every token that they made is here, or belongs to an attempt that has ended.

    Version, Drained -> Marks.add(version, owed) -> settled(version, holds), asked before each step

Pure. The staleness bound rests on this: a step at version v waits until v - S is settled (docs/staleness.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from opd_async.transport.owed import OwedSample


@dataclass(slots=True)
class Mark:
    """Every token made by weights `version` or older is held, or lies before the end of one of these samples."""

    version: int
    owed: dict[int, OwedSample]
    """By sample id; shrinks as tokens arrive."""


class Marks:
    """The marks that are not settled yet, oldest first; each is made when the engines get new weights."""

    def __init__(self) -> None:
        self._marks: list[Mark] = []
        self._settled_through: int | None = None

    def start_at(self, version: int) -> None:
        """Begin at `version`: no token of older weights exists."""
        self._settled_through = version - 1

    def add(self, version: int, owed: Iterable[OwedSample], holds: Callable[[OwedSample], bool]) -> None:
        """Learn which tokens of weights `version` or older may still be on their way; all others are held.

        Marks that are settled by now are forgotten: where steps do not wait for them, nobody else would.
        """
        self._marks.append(Mark(version, {one.sample_id: one for one in owed}))
        self._settle(version, holds)

    def settled(self, version: int, holds: Callable[[OwedSample], bool]) -> bool:
        """Whether every token made by weights `version` or older is here. True before the first mark is due."""
        self._settle(version, holds)
        if self._marks and self._marks[0].version <= version:
            return False
        return self._settled_through is None or self._settled_through >= version

    def _settle(self, version: int, holds: Callable[[OwedSample], bool]) -> None:
        """Forget the marks up to `version` that nothing is missing of, oldest first."""
        while self._marks and self._marks[0].version <= version:
            mark = self._marks[0]
            for one in [one for one in mark.owed.values() if holds(one)]:
                del mark.owed[one.sample_id]
            if mark.owed:
                return
            self._settled_through = mark.version
            self._marks.pop(0)

    def owed(self) -> list[OwedSample]:
        """What the oldest mark still waits for."""
        return list(self._marks[0].owed.values()) if self._marks else []
