"""Divergences from lists of likeliest tokens: never above the true ones, and equal to them where nothing is hidden."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from opd_async.estimators.topk import NO_LOGPROB, NO_TOKEN, TopK
from opd_async.estimators.topk_kl import Divergences, divergences

ROUNDING = 1e-5
"""Of cells that are at least 1e-7. Logprobs are float64 here: what float32 hides is not the formula's."""
Rows = NDArray[Any]


def rows(n: int, vocab: int, spread: float, seed: int) -> Rows:
    """float64[n, vocab]: logprobs of n distributions."""
    logits = np.random.default_rng(seed).normal(0.0, spread, (n, vocab))
    return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))


def top(logprobs: Rows, k: int) -> TopK:
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k].astype(np.int32)
    return TopK(ids, np.take_along_axis(logprobs, ids, axis=1))


def exact(p: Rows, q: Rows) -> Divergences:
    return Divergences((np.exp(p) * (p - q)).sum(1), (np.exp(q) * (q - p)).sum(1))


def bounds(p: Rows, q: Rows, k: int, j: int, seed: int = 0) -> Divergences:
    """Of tokens that p samples."""
    rng = np.random.default_rng(seed)
    tokens = np.array([rng.choice(p.shape[1], p=np.exp(row) / np.exp(row).sum()) for row in p])
    at = np.arange(len(p))
    return divergences(top(p, k), top(q, j), tokens.astype(np.int32), p[at, tokens], q[at, tokens])


@settings(deadline=None, max_examples=200)
@given(
    vocab=st.integers(2, 40),
    k=st.integers(1, 40),
    j=st.integers(1, 40),
    spread=st.sampled_from([0.3, 1.0, 3.0, 8.0]),
    other=st.sampled_from([0.3, 1.0, 3.0, 8.0]),
    seed=st.integers(0, 2**16),
)
def test_bounds_are_below_and_lists_of_everything_are_exact(
    vocab: int, k: int, j: int, spread: float, other: float, seed: int
) -> None:
    p, q = rows(5, vocab, spread, seed), rows(5, vocab, other, seed + 1)
    found, true = bounds(p, q, min(k, vocab), min(j, vocab), seed), exact(p, q)
    assert (found.reverse <= true.reverse + ROUNDING).all() and (found.forward <= true.forward + ROUNDING).all()
    assert (found.reverse > -ROUNDING).all() and (found.forward > -ROUNDING).all()
    whole = bounds(p, q, vocab, vocab, seed)
    np.testing.assert_allclose(whole.reverse, true.reverse, rtol=1e-5, atol=ROUNDING)
    np.testing.assert_allclose(whole.forward, true.forward, rtol=1e-5, atol=ROUNDING)


def test_longer_lists_come_closer() -> None:
    """Of distributions like those of language models a short list has most."""
    p = rows(200, 2000, 3.0, 1)
    q = 0.8 * p + 0.2 * rows(200, 2000, 3.0, 2)
    q -= np.logaddexp.reduce(q, axis=1, keepdims=True)
    true = exact(p, q)
    shares = []
    for k in (4, 16, 64, 256, 2000):
        found = bounds(p, q, k, k)
        shares.append((found.reverse.mean() / true.reverse.mean(), found.forward.mean() / true.forward.mean()))
    assert all(first < second for first, second in zip(np.ravel(shares[:-1]), np.ravel(shares[1:]), strict=True))
    assert min(shares[2]) > 0.65 and shares[-1] == pytest.approx((1.0, 1.0), abs=1e-4)


def test_a_token_that_the_other_side_rules_out_counts() -> None:
    """One cell for all that is not in both lists would hide it among the rest."""
    p = np.log(np.array([[0.5, 0.4, 0.06, 0.04 - 3e-6, 1e-6, 1e-6, 1e-6]]))
    q = np.log(np.array([[0.5, 1e-6, 0.3, 0.1, 0.05, 0.03, 0.02 - 1e-6]]))
    token = np.zeros(1, np.int32)
    found = divergences(top(p, 3), top(q, 6), token, p[:, 0], q[:, 0])
    lumped = 0.4 * np.log(0.4 / 0.2)  # with all but the common ids 0 and 2 as one cell, and more than that has
    assert lumped < 1.1 < found.reverse[0] <= exact(p, q).reverse[0]


def test_ids_that_one_side_alone_has_are_of_the_rest() -> None:
    """Their probability is among what the others leave, and no list says where."""
    p = rows(4, 8, 1.0, 3)
    wide = rows(4, 12, 1.0, 4)
    q = top(wide, 12).below(8)
    assert (q.ids == NO_TOKEN).sum() == 16 and (q.logprobs[q.ids == NO_TOKEN] == NO_LOGPROB).all()
    padded = np.concatenate([p, np.full((4, 4), np.log(2.5e-8))], axis=1)  # as good as nothing
    found = divergences(top(p, 8), q, np.zeros(4, np.int32), p[:, 0], wide[:, 0])
    true = exact(padded, wide)
    np.testing.assert_allclose(found.reverse, true.reverse, atol=1e-5)
    assert (found.forward <= true.forward + 1e-4).all() and (found.forward > 1.0).all()


def test_no_rows() -> None:
    none = TopK(np.zeros((0, 3), np.int32), np.zeros((0, 3), np.float32))
    empty = np.zeros(0, np.float32)
    assert len(divergences(none, none, np.zeros(0, np.int32), empty, empty).reverse) == 0
