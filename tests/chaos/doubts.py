"""Faults that a run has not survived: thrown once more, alone, to tell a fault from what the machine did meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from regimes import Regime

MOST = 2
"""Where more was not survived, nothing is thrown again: all of it is wrong."""
DEFECT = "a defect of this program"


class Doubt(NamedTuple):
    """A fault that a run has not survived, and what the run said."""

    regime: Regime
    kind: str
    """Empty where the run had only begun."""
    text: str


def wrong_of(doubts: Sequence[Doubt], survives: Callable[[Doubt], bool]) -> list[str]:
    """What stays wrong, in words; what `survives` alone is printed instead."""
    wrong = []
    for doubt in doubts:
        if len(doubts) <= MOST and DEFECT not in doubt.text and survives(doubt):
            print(f"Survived alone, and to be mended: {doubt.text.splitlines()[0]}", flush=True)
        else:
            wrong.append(doubt.text)
    return wrong
