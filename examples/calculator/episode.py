"""The calculator and the episode in which a model uses it; `rollout.function` of calculator.yaml. Pure Python.

(47+58)*29-13=                                         prompt
[47+58]0105[0105*29]3045[3045-13]3032:3032             response: calls and answer are the model's, 0105, 3045 and
                                                       the first 3032 are given by the calculator
"""

from __future__ import annotations

import operator
import re
from typing import Any

CALLS = 3
"""Most calls that an episode may make; the longest expressions have as many operations."""
TURN_TOKENS = 12
"""Most tokens of a turn; the longest right one, a call such as `[0105*29]`, has 9."""
DISPLAY = 9999
"""The largest number that the calculator shows; the smallest is 0."""
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}

_CALL = re.compile(r"\[([0-9]{2,4})([+*-])([0-9]{2,4})\]")


def calculate(call: str) -> str | None:
    """The four digits that the calculator shows for a call such as `[47+58]`; None if it cannot.

    It cannot where the text is no call, and where the result is below 0 or above 9999.
    """
    if (match := _CALL.fullmatch(call)) is None:
        return None
    result = OPERATIONS[match[2]](int(match[1]), int(match[3]))
    return f"{result:04d}" if 0 <= result <= DISPLAY else None


async def episode(session: Any, row: dict[str, Any]) -> float:
    """Let the model call the calculator until it answers; 1 for the right answer, else 0.

    A call that the calculator cannot answer, a fourth one, and a turn that does not end are the end of the episode.
    """
    for calls_left in reversed(range(CALLS + 1)):
        turn = await session.generate(max_tokens=TURN_TOKENS, stop="]")
        if turn.finish == "length" or not turn.text.endswith("]"):
            return float(turn.finish == "stop" and turn.text == f":{row['label']}")
        shown = calculate(turn.text)
        if shown is None or not calls_left:
            break
        await session.give(shown)
    return 0.0
