"""Answers and confidence intervals."""

from __future__ import annotations

import pytest

from opd_async.data.answers import AnswerChecker
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
