"""A taskset of `verifiers`, as somebody would write it for anything else: sums, a reward, no word of this project."""

from __future__ import annotations

from collections.abc import Iterable

import verifiers.v1 as vf

__all__ = ["Sums"]


class SumData(vf.TaskData):
    """One sum."""

    answer: str


class Sum(vf.Task[SumData]):
    """Right where the last message is the answer."""

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        """1 or 0."""
        return float((trace.last_reply or "").strip() == self.data.answer)


class Sums(vf.Taskset[Sum]):
    """Three of them."""

    def load(self) -> Iterable[Sum]:
        """The tasks."""
        for a, b in ((2, 3), (4, 4), (5, 1)):
            yield Sum(SumData(prompt=f"Add {a} and {b}", answer=str(a + b)), self.config.task)
