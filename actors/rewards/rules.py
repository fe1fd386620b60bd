"""What a response earns by rule: math-verify, an exact match, or a function of the user's own. No sockets, no clock.

    python -m opd_async.actors.rewards.rules KIND FUNCTION PATTERN    check a rule: prints what is wrong, or nothing

A rule either returns a number or raises; a failure is for the caller to count, never a reward of zero.
"""

from __future__ import annotations

import inspect
import logging
import math
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from opd_async.config.rewards import RewardKind
from opd_async.data.answers import AnswerChecker
from opd_async.errors import InputError
from opd_async.extras import need
from opd_async.hooks import load_hook


@dataclass(frozen=True, slots=True)
class Response:
    """A response and what is known of its prompt. `finished` is False where it was cut at its longest."""

    prompt: str
    text: str
    label: str
    metadata: dict[str, Any]
    finished: bool


Rule = Callable[[Response], Awaitable[float]]


class UnusableRewardError(ValueError):
    """There is no reward for this response, whatever it says: the label cannot be read, the function's answer is no
    number."""


def load_rule(kind: RewardKind, function: str | None, answer_pattern: str) -> Rule:
    """The rule of a topology; `InputError` when it cannot be loaded."""
    return LOADERS[kind](function or "", answer_pattern)


def _load_exact_match(_function: str, answer_pattern: str) -> Rule:
    """1 where the response ended and the pattern finds the label in it, else 0."""
    checker = AnswerChecker(answer_pattern)

    async def exact_match(response: Response) -> float:
        return float(checker.correct(response.text, response.label, response.finished))

    return exact_match


def _load_math(_function: str, _answer_pattern: str) -> Rule:
    """1 where math-verify finds the label's value in the response, else 0. Loaded here: it brings sympy along."""
    math_verify = need("math_verify", "math", "reward.kind: math")
    # it warns at each call that its own timeouts are off: they are signals, and the caller has a deadline
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    async def math_reward(response: Response) -> float:
        gold = math_verify.parse(f"\\boxed{{{response.label}}}", parsing_timeout=None)
        if not gold:
            raise UnusableRewardError(f"the label {response.label!r} is no mathematical expression")
        answer = math_verify.parse(response.text, parsing_timeout=None)
        return float(math_verify.verify(gold, answer, timeout_seconds=None))

    return math_reward


def _load_function(path: str, _answer_pattern: str) -> Rule:
    """`module:function`, awaited with prompt, response, label and metadata by name."""
    function = load_hook("reward.function", path)
    if not inspect.iscoroutinefunction(function):
        raise InputError(f"reward.function: {path} is no `async def` function; write one that returns a number")

    async def user_reward(response: Response) -> float:
        value = await function(
            prompt=response.prompt, response=response.text, label=response.label, metadata=response.metadata
        )
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
        raise UnusableRewardError(f"{path} returned {value!r}, which is no finite number")

    return user_reward


LOADERS: dict[RewardKind, Callable[[str, str], Rule]] = {
    RewardKind.MATH: _load_math,
    RewardKind.EXACT_MATCH: _load_exact_match,
    RewardKind.PYTHON: _load_function,
}
"""From `reward.function` and `evaluation.answer_pattern` to a rule, by kind."""


if __name__ == "__main__":
    try:
        load_rule(RewardKind(sys.argv[1]), sys.argv[2], sys.argv[3])
    except InputError as problem:
        sys.exit(str(problem))
