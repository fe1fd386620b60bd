"""Answers and confidence intervals."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.answers import AnswerChecker, wilson_interval
from opd_async.errors import InputError


def test_the_quickstart_pattern_takes_one_colon_and_digits() -> None:
    checker = AnswerChecker(r"^[^:]*:(\d+)$")
    assert checker.correct("7+9+0=16,4+8+1=13,3+5+1=09:0936", "0936", finished=True)
    assert not checker.correct("7+9+0=16:0936", "936", finished=True)
    assert not checker.correct("1:2:0936", "0936", finished=True)
    assert not checker.correct("1:0936,", "0936", finished=True)
    assert not checker.correct("1:0936", "0936", finished=False)
    assert not checker.correct("", "0936", finished=True)


def test_a_prompt_without_label_is_never_right() -> None:
    assert not AnswerChecker(r"(?s)^(.*)$").correct("", "", finished=True)
    assert AnswerChecker(r"(?s)^(.*)$").correct("a\nb", "a\nb", finished=True)
    assert not AnswerChecker(r"x|(y)").correct("x", "y", finished=True)


@pytest.mark.parametrize(("pattern", "reason"), [("(", "not a regular expression"), ("abc", "has no group")])
def test_unusable_patterns(pattern: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        AnswerChecker(pattern)


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=6e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 5)[1] == 1.0
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson_interval(3, 2)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_rate(case: tuple[int, int]) -> None:
    successes, n = case
    low, high = wilson_interval(successes, n)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
