"""The quickstart's task: add two numbers of 3 digits (or more) with the columns written out, lowest digit first.

    347+589=            prompt: both numbers zero-padded to three digits
    7+9+0=16,4+8+1=13,3+5+1=09:0936
    └ column: digit + digit + carry = two-digit sum       └ label: the sum, zero-padded to four digits

A response is right when it holds exactly one ':' and the text after it is the label; the columns are not checked.
Five of 97 hash classes of (a, b) are held out, so the split is the same in every process and needs no file.
Pure Python: importable where there is neither torch nor a tokenizer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIGITS = 3
"""Digits of a number in the quickstart; everything here takes another number of them as well."""
#: Characters that a prompt or a response may hold, in the order of their token ids.
ALPHABET = "0123456789+=,:"
#: The held-out prompts are drawn with their own seed: `--seed` of the training data must not move the test set.
HELD_OUT_SEED = 12345

_PROMPT = re.compile(r"([0-9]+)\+([0-9]+)=")


def response_tokens(digits: int = DIGITS) -> int:
    """The longest right response: columns of 8 characters, commas between them, ':', the sum, end of sequence."""
    return 8 * digits + (digits - 1) + 1 + (digits + 1) + 1


RESPONSE_TOKENS = response_tokens()


@dataclass(frozen=True, slots=True)
class Problem:
    """One addition, 0 <= a, b < 10**digits."""

    a: int
    b: int
    digits: int = DIGITS

    def __post_init__(self) -> None:
        """Raise ValueError for a number outside the task's range."""
        if not (0 <= self.a < 10**self.digits and 0 <= self.b < 10**self.digits):
            raise ValueError(f"addition takes numbers from 0 to {10**self.digits - 1}, got {self.a} and {self.b}")

    @property
    def prompt(self) -> str:
        """What the student is given, for instance `347+589=`."""
        return f"{self.a:0{self.digits}d}+{self.b:0{self.digits}d}="

    @property
    def label(self) -> str:
        """The sum as a response must state it, for instance `0936`."""
        return f"{self.a + self.b:0{self.digits + 1}d}"

    @property
    def answer(self) -> str:
        """The reference response: the columns from the lowest digit up, then ':' and the label."""
        carry, columns = 0, []
        digits_a, digits_b = f"{self.a:0{self.digits}d}", f"{self.b:0{self.digits}d}"
        for x, y in zip(reversed(digits_a), reversed(digits_b), strict=True):
            total = int(x) + int(y) + carry
            columns.append(f"{x}+{y}+{carry}={total:02d}")
            carry = total // 10
        return ",".join(columns) + ":" + self.label

    @property
    def other_answer(self) -> str:
        """The same with each column the other way round: `0+9+7=16`."""
        columns, _, label = self.answer.partition(":")
        return ",".join(f"{column[4::-1]}{column[5:]}" for column in columns.split(",")) + ":" + label

    @property
    def held_out(self) -> bool:
        """Whether this problem belongs to the test split (5 of 97 hash classes, 5.2 % of all problems)."""
        return (self.a * 7919 + self.b * 104729) % 97 < 5

    def row(self) -> dict[str, Any]:
        """The problem as one line of a data file."""
        return {"prompt": self.prompt, "label": self.label, "metadata": {"a": self.a, "b": self.b}}


def parse_prompt(prompt: str) -> Problem:
    """Read a prompt back; ValueError when it is not of the form `347+589=`."""
    match = _PROMPT.fullmatch(prompt)
    if match is None or len(match[1]) != len(match[2]):
        raise ValueError(f"not an addition prompt: {prompt!r}; expected two numbers of one length like '347+589='")
    return Problem(int(match[1]), int(match[2]), len(match[1]))


def is_correct(response: str, label: str) -> bool:
    """Whether a finished response states the label after its only ':'.

    `response` is decoded without special tokens. A response cut off by the length limit has not been finished:
    its caller counts it as wrong.
    """
    before, colon, stated = response.partition(":")
    return bool(before and colon) and stated == label


def draw(count: int, *, seed: int | str, held_out: bool, digits: int = DIGITS) -> list[Problem]:
    """Draw `count` different problems of one split, in a random order that `seed` alone decides.

    A longer draw with the same seed begins with the shorter one. ValueError when the split has fewer problems.
    """
    if count < 1:
        raise ValueError(f"cannot draw {count} problems; ask for at least 1")
    # 5 of 97 classes, up to rounding: refusing 1 % early keeps the loop below from hunting for the last few
    numbers = 10**digits
    limit = int(numbers**2 * (5 if held_out else 92) / 97 * 0.99)
    if count > limit:
        split = "held-out" if held_out else "training"
        raise ValueError(f"cannot draw {count} different {split} problems; the split has room for {limit}")
    source, chosen = random.Random(seed), dict[Problem, None]()
    while len(chosen) < count:
        problem = Problem(*divmod(source.randrange(numbers**2), numbers), digits)
        if problem.held_out == held_out:
            chosen[problem] = None
    return list(chosen)


def held_out_problems(count: int = 1000, digits: int = DIGITS) -> list[Problem]:
    """The test set: the same problems in the same order everywhere."""
    return draw(count, seed=HELD_OUT_SEED, held_out=True, digits=digits)


def read_rows(path: Path) -> Iterator[Problem]:
    """Read a data file back, checking every line.

    Raises ValueError naming file and line when a line is no JSON object, has no prompt or label, or when its label or
    metadata disagrees with its prompt.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                problem = parse_prompt(row["prompt"])
                if row != problem.row():
                    raise ValueError(f"row {row} does not match its prompt; expected {problem.row()}")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: {error!s}; write the data again with make_data.py") from error
            yield problem
