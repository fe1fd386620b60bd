"""The task: expressions of two or three operations, their transcripts with calls, the split. Pure Python.

A problem begins with two numbers; each further operation takes the result so far and one more number, on either side.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from episode import DISPLAY, OPERATIONS

ALPHABET = "0123456789+-*()=[]:"
"""Characters that a prompt or a response may hold, in the order of their token ids."""
LARGEST = 99
"""Numbers of a problem are from 10 to this."""
HELD_OUT_SEED = 12345
"""The held-out problems do not depend on the seed of the training data."""
HELD_OUT_CLASSES = 20
"""One in so many problems is held out, by a checksum of its prompt."""

_RANK = {"+": 1, "-": 1, "*": 2}


@dataclass(frozen=True, slots=True)
class Problem:
    """The first two numbers and their operation; then, number by number, the result with it or it with the result."""

    numbers: tuple[int, ...]
    operations: str
    """One of `+-*` for each number but the first."""
    result_first: tuple[bool, ...]
    """For each number but the first two, whether the result so far stands in front of the operation."""

    def results(self) -> list[int]:
        """The value after each operation."""
        values = [OPERATIONS[self.operations[0]](self.numbers[0], self.numbers[1])]
        for number, sign, first in zip(self.numbers[2:], self.operations[1:], self.result_first, strict=True):
            pair = (values[-1], number) if first else (number, values[-1])
            values.append(OPERATIONS[sign](*pair))
        return values

    @property
    def possible(self) -> bool:
        """Whether the calculator can show every result."""
        return all(0 <= value <= DISPLAY for value in self.results())

    @property
    def prompt(self) -> str:
        """What the model is given, with no more brackets than are needed: `(47+58)*29=`."""
        text, rank = f"{self.numbers[0]}{self.operations[0]}{self.numbers[1]}", _RANK[self.operations[0]]
        for number, sign, first in zip(self.numbers[2:], self.operations[1:], self.result_first, strict=True):
            outer = _RANK[sign]
            # operations of one rank are done from left to right
            if rank < outer or (rank == outer and not first):
                text = f"({text})"
            text, rank = (f"{text}{sign}{number}" if first else f"{number}{sign}{text}"), outer
        return f"{text}="

    @property
    def label(self) -> str:
        """The answer as it must be stated, for instance `3032`."""
        return f"{self.results()[-1]:04d}"

    @property
    def turns(self) -> list[tuple[str, str]]:
        """What the model should say, each with what it is given behind it: calls, and at last the answer."""
        shown = [f"{value:04d}" for value in self.results()]
        turns = [(f"[{self.numbers[0]}{self.operations[0]}{self.numbers[1]}]", shown[0])]
        further = zip(shown, shown[1:], self.numbers[2:], self.operations[1:], self.result_first, strict=False)
        for before, after, number, sign, first in further:
            turns.append((f"[{before}{sign}{number}]" if first else f"[{number}{sign}{before}]", after))
        return [*turns, (f":{self.label}", "")]

    @property
    def held_out(self) -> bool:
        """Whether this problem belongs to the test split."""
        return zlib.crc32(self.prompt.encode()) % HELD_OUT_CLASSES == 0

    def row(self) -> dict[str, Any]:
        """The problem as one line of a data file."""
        return {"prompt": self.prompt, "label": self.label, "metadata": {"operations": len(self.operations)}}


def draw(count: int, *, seed: int | str, held_out: bool) -> list[Problem]:
    """Draw `count` different problems of one split, in a random order that `seed` alone decides."""
    source, chosen = random.Random(seed), dict[str, Problem]()
    while len(chosen) < count:
        problem = _any(source)
        if problem.possible and problem.held_out == held_out:
            chosen[problem.prompt] = problem
    return list(chosen.values())


def held_out_problems(count: int = 1000) -> list[Problem]:
    """The test set: the same problems in the same order everywhere."""
    return draw(count, seed=HELD_OUT_SEED, held_out=True)


def _any(source: random.Random) -> Problem:
    size = source.choice((3, 4))
    return Problem(
        tuple(source.randint(10, LARGEST) for _ in range(size)),
        "".join(source.choices(tuple(OPERATIONS), k=size - 1)),
        tuple(source.random() < 0.5 for _ in range(size - 2)),
    )


def transcript(problem: Problem) -> tuple[str, Sequence[bool]]:
    """The response as one text without its end, and for each character whether the model says it."""
    text, said = "", list[bool]()
    for spoken, given in problem.turns:
        text += spoken + given
        said += [True] * len(spoken) + [False] * len(given)
    return text, said
