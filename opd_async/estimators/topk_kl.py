"""KL divergences of two distributions of which only the likeliest tokens are known: bounds from below.

Per row, p and q over one vocabulary; P and Q are the ids of p's and of q's list, y one more id whose probability both
have said (the token that stands there). The vocabulary falls into cells:

    C  each id that is known of both: in P and in Q, or y      sum_C p log(p / q) is exact
    B  the other ids of P: p(B) is known, and q(B) = x is at most |B| times the least probability in Q's list, since an
       id outside of the list is no likelier, and at most what Q and y leave of q
    R  the rest: p(R) = 1 - p(C) - p(B), and q(R) = 1 - q(C) - x

By the log-sum inequality (Cover and Thomas, Elements of Information Theory, 2006, theorem 2.7.1) a divergence over
cells is at most that over ids, so KL(p || q) is at least

    sum_C p log(p / q)  +  min over x of  p(B) log(p(B) / x) + p(R) log(p(R) / (1 - q(C) - x))

The function of x is convex, with its minimum at (1 - q(C)) p(B) / (p(B) + p(R)); where x cannot be so large, the
largest x is the best one. Where both lists have every id the bound is the divergence itself. KL(q || p) is the same
with p and q in each other's places.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_async.estimators.topk import NO_TOKEN, TopK

CELL_FLOOR = 1e-7
"""Smallest probability of a cell that is what others leave: float32 logprobs do not tell smaller ones from 0."""
Floats = NDArray[np.float64]


class Divergences(NamedTuple):
    """float64[n] each, nats: KL(p || q) and KL(q || p), from below but for rounding."""

    reverse: Floats
    forward: Floats


class _Side(NamedTuple):
    """One distribution in each of n rows: probabilities, float64[n], of the cells."""

    common: Floats
    """Of C."""
    alone: Floats
    """Of the ids that stand in its own list only, without y."""
    size: Floats
    """How many those are."""
    least: Floats
    """The least probability in its list: no other id has a larger one."""


def divergences(
    p: TopK, q: TopK, token_ids: NDArray[np.int32], p_logprobs: NDArray[np.float32], q_logprobs: NDArray[np.float32]
) -> Divergences:
    """Bound both divergences from below in each of n rows; with lists of every id they are exact.

    `p` [n, k] and `q` [n, j] are the likeliest tokens on either side, with places without a token (`NO_TOKEN`) where
    one side has ids that the other has not. `token_ids` int32[n] are the tokens that stand there, with their logprobs
    float32[n] on either side.
    """
    p_list, q_list = p.logprobs.astype(np.float64), q.logprobs.astype(np.float64)
    place = _places(p.ids, q.ids)
    both = place >= 0
    q_there = np.where(both, np.take_along_axis(q_list, np.maximum(place, 0), axis=1), 0.0)
    p_there = np.where(both, p_list, 0.0)
    p_both, q_both = np.exp(p_there) * both, np.exp(q_there) * both
    p_token, q_token = p_logprobs.astype(np.float64), q_logprobs.astype(np.float64)
    in_p, in_q = (p.ids == token_ids[:, None]).any(1), (q.ids == token_ids[:, None]).any(1)
    extra = ~(in_p & in_q)
    mine = _side(p, p_list, p_both, np.exp(p_token), extra, in_p)
    other = _side(q, q_list, q_both, np.exp(q_token), extra, in_q)
    gap, token_gap = p_there - q_there, np.where(extra, p_token - q_token, 0.0)
    reverse = (p_both * gap).sum(1) + np.exp(p_token) * token_gap
    forward = -(q_both * gap).sum(1) - np.exp(q_token) * token_gap
    return Divergences(reverse + _outside(mine, other), forward + _outside(other, mine))


def _places(ids: NDArray[np.int32], others: NDArray[np.int32]) -> NDArray[np.intp]:
    """intp[n, k]: where in its row of `others` [n, j] each of `ids` [n, k] stands; -1 where it does not."""
    rows, width = others.shape
    span = np.int64(2**32)
    # one sorted list for all rows: an id's key begins with its row
    base = np.arange(rows, dtype=np.int64)[:, None] * span + 1
    keys = (others + base).ravel()
    order = np.argsort(keys, kind="stable")
    wanted = ids + base
    found = order[np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)]
    there = (keys[found] == wanted) & (ids != NO_TOKEN)
    return np.where(there, found % width, -1)


def _side(
    topk: TopK, logprobs: Floats, both: Floats, token: Floats, extra: NDArray[np.bool_], inside: NDArray[np.bool_]
) -> _Side:
    """`both` [n, k] has the probabilities of the ids that are in both lists, in any order, and 0 elsewhere."""
    real = topk.ids != NO_TOKEN
    listed = np.where(real, np.exp(logprobs), 0.0)
    alone = listed.sum(1) - both.sum(1) - token * (extra & inside)
    size = real.sum(1) - (both > 0.0).sum(1) - (extra & inside)
    least = np.where(real.any(1), np.where(real, listed, 1.0).min(1), 1.0)
    return _Side(both.sum(1) + token * extra, np.maximum(alone, 0.0), size.astype(np.float64), least)


def _outside(p: _Side, q: _Side) -> Floats:
    """The least that the cells B and R add to KL(p || q), float64[n]."""
    rest, left = _floored(1.0 - p.common - p.alone), _floored(1.0 - q.common)
    most = np.minimum(p.size * q.least, _floored(left - q.alone))
    x = np.minimum(left * p.alone / (p.alone + rest), most)
    known = p.alone > 0.0
    ratio = np.where(known, p.alone, 1.0) / np.where(known, np.maximum(x, CELL_FLOOR**2), 1.0)
    return p.alone * np.log(ratio) + rest * np.log(rest / _floored(left - x))


def _floored(values: Floats) -> Floats:
    return np.maximum(values, CELL_FLOOR)
