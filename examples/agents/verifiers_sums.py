"""A taskset of `verifiers`, as somebody would write it for anything else: sums, a tool, a reward; no word of this
project."""

from __future__ import annotations

from collections.abc import Iterable

import verifiers.v1 as vf

__all__ = ["Sums"]


class SumData(vf.TaskData):
    """One sum."""

    answer: str


class Calculator(vf.Toolset[vf.ToolsetConfig, vf.State]):
    """What an agent may call."""

    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)


class Sum(vf.Task[SumData]):
    """Right where the last message is the answer."""

    @classmethod
    def toolsets(cls, config: vf.TaskConfig) -> list[vf.Toolset]:
        """The calculator."""
        return [Calculator(vf.ToolsetConfig())]

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


if __name__ == "__main__":
    Calculator.run()
