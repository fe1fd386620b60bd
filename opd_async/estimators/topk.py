"""The teacher's most likely tokens at each position, where a loss needs them.

Arrays travel together or not at all: `ids` int32[n, k] and `logprobs` float32[n, k], row i for token i of its holder.
A teacher may have tokens that the student has not. Where one is among its k likeliest, its place holds no token: its
probability belongs to the tail, as that of every token that is not in the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_LOGPROB = 1e-3
"""Rounding may lift a logprob of nearly certain tokens a little above zero."""
MAX_TOTAL = 1.0 + 1e-2
"""Largest sum of a row's probabilities: one, and the rounding of a bfloat16 engine."""
NO_TOKEN = -1
"""In the place of an id that the student does not have."""
NO_LOGPROB = -1.0e4
"""Beside it, nats: a probability of exactly 0 in float32 and float64, and a number that can be calculated with."""


class TopK(NamedTuple):
    """`ids` int32[n, k], distinct in each row or `NO_TOKEN`; `logprobs` float32[n, k] of these ids, nats, temperature
    1, or `NO_LOGPROB`."""

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    @classmethod
    def of(cls, ids: NDArray[np.int32] | None, logprobs: NDArray[np.float32] | None) -> TopK | None:
        """From the optional fields of a message; None unless both are there."""
        return None if ids is None or logprobs is None else cls(ids, logprobs)

    def rows(self, start: int, end: int) -> TopK:
        """Rows [start, end) of both arrays, as views of them."""
        return TopK(self.ids[start:end], self.logprobs[start:end])

    def below(self, vocab: int) -> TopK:
        """The same rows without ids at or beyond `vocab`: their places hold `NO_TOKEN`. Copies only what changes."""
        beyond = self.ids >= vocab
        if not beyond.any():
            return self
        ids, logprobs = np.where(beyond, NO_TOKEN, self.ids), np.where(beyond, NO_LOGPROB, self.logprobs)
        return TopK(ids.astype(np.int32), logprobs.astype(np.float32))

    def problem(self) -> str | None:
        """Why this cannot be the top of a distribution, in words; None if it can."""
        if self.ids.ndim != 2 or self.ids.shape != self.logprobs.shape or not self.ids.shape[1]:
            return f"shapes {self.ids.shape} and {self.logprobs.shape} are not the same [n, k]"
        if not len(self.ids):
            return None
        if not (np.isfinite(self.logprobs).all() and float(self.logprobs.max()) <= MAX_LOGPROB):
            return "a logprob is not a finite number <= 0"
        lowest = int(self.ids.min())
        if lowest == NO_TOKEN and not (self.logprobs[self.ids == NO_TOKEN] == NO_LOGPROB).all():
            return f"a place without a token has another logprob than {NO_LOGPROB:g}"
        if lowest < NO_TOKEN or _comes_twice(self.ids):
            return "an id is negative or comes twice in a row"
        if float(np.einsum("nk->n", np.exp(self.logprobs)).max()) > MAX_TOTAL:  # faster than sum(1) for a few numbers
            return "the probabilities of a row add up to more than one"
        return None


def _comes_twice(ids: NDArray[np.int32]) -> bool:
    """Whether a row has an id twice. Neighbours of all rows are compared at once, which takes far less time than going
    row by row: these are a few numbers each."""
    ordered = np.sort(ids, axis=1).ravel()
    same = ordered[1:] == ordered[:-1]
    same[ids.shape[1] - 1 :: ids.shape[1]] = False  # the last of a row and the first of the next
    return bool(same.any()) and bool((ordered[1:][same] != NO_TOKEN).any())


def join(parts: Sequence[TopK | None]) -> TopK | None:
    """Rows of all parts back to back, those without any left out; None if none has any."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return TopK(np.concatenate([part.ids for part in present]), np.concatenate([part.logprobs for part in present]))


def split(topk: TopK | None, counts: Sequence[int]) -> list[TopK | None]:
    """Inverse of `join` for parts of `counts` rows."""
    if topk is None:
        return [None] * len(counts)
    ends = np.cumsum(counts).tolist()
    return [topk.rows(end - count, end) for end, count in zip(ends, counts, strict=True)]
