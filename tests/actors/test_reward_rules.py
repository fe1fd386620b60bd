"""The rules themselves: what is right, and what cannot be judged."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from opd_async.actors.rewards.rules import Response, Rule, UnusableRewardError, load_rule
from opd_async.config.rewards import RewardKind
from opd_async.errors import InputError


def judged(rule: Rule, text: str, label: str, finished: bool = True) -> float:
    async def ask() -> float:
        return await rule(Response("", text, label, {}, finished))

    return asyncio.run(ask())


def test_exact_match_is_the_evaluations_answer() -> None:
    rule = load_rule(RewardKind.EXACT_MATCH, None, r"= (\d+)$")
    assert judged(rule, "1 + 1 = 2", "2") == 1.0
    assert judged(rule, "1 + 1 = 2", "3") == 0.0
    assert judged(rule, "1 + 1 = 2", "2", finished=False) == 0.0
    assert judged(rule, "", "2") == 0.0


def test_math_compares_values_not_texts() -> None:
    rule = load_rule(RewardKind.MATH, None, "(.*)")
    assert judged(rule, r"so the answer is \boxed{0.5}", r"\frac{1}{2}") == 1.0
    assert judged(rule, r"so the answer is \boxed{34}", "34") == 1.0
    assert judged(rule, r"so the answer is \boxed{35}", "34") == 0.0
    assert judged(rule, "I do not know", "34") == judged(rule, "", "34") == 0.0
    with pytest.raises(UnusableRewardError, match="is no mathematical expression"):
        judged(rule, r"\boxed{34}", "")


def test_a_users_function_must_be_there_and_asynchronous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_reward_module.py").write_text("def plain(**_): return 1\nasync def text(**_): return 'one'\n")
    (tmp_path / "my_broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for path, expected in (
        ("no_such_module:judge", "no_such_module:judge cannot be loaded .ModuleNotFoundError"),
        ("my_broken_module:judge", "cannot be loaded .ZeroDivisionError: division by zero"),
        ("my_reward_module:judge", "cannot be loaded .AttributeError"),
        ("my_reward_module:plain", "plain is no `async def` function"),
    ):
        with pytest.raises(InputError, match=expected):
            load_rule(RewardKind.PYTHON, path, "(.*)")
    with pytest.raises(UnusableRewardError, match="returned 'one', which is no finite number"):
        judged(load_rule(RewardKind.PYTHON, "my_reward_module:text", "(.*)"), "", "")
