"""Is a response right, and how sure is a pass rate."""

from __future__ import annotations

import math
import re

from opd_async.errors import InputError

_Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


class AnswerChecker:
    """Compares the first group of a regular expression, found in the response text, with the label.

    Raises `InputError` if the pattern is not a regular expression or has no group.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise InputError(f"answer pattern {pattern!r} is not a regular expression: {error}") from None
        if self._pattern.groups == 0:
            raise InputError(f"answer pattern {pattern!r} has no group; put the answer in parentheses, as in ^(.*)$")

    def correct(self, response_text: str, label: str, finished: bool) -> bool:
        """True if the response ended by itself (`finished`) and its answer equals a label that is not empty."""
        if not finished or not label:
            return False
        match = self._pattern.search(response_text)
        return match is not None and match.group(1) == label


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % score interval of a success rate (Wilson 1927), as shares in [0, 1]; (0, 1) when n is 0.

    centre = (p + z^2/2n) / (1 + z^2/n), half width = z/(1 + z^2/n) * sqrt(p(1-p)/n + z^2/4n^2).
    Raises `ValueError` unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    if n == 0:
        return 0.0, 1.0
    rate = successes / n
    scale = 1 + _Z_95**2 / n
    centre = (rate + _Z_95**2 / (2 * n)) / scale
    half = _Z_95 / scale * math.sqrt(rate * (1 - rate) / n + _Z_95**2 / (4 * n * n))
    # At 0 and n successes the formula gives exactly 0 and 1, which rounding may miss by one part in 10^17.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    return low, 1.0 if successes == n else min(1.0, centre + half)
