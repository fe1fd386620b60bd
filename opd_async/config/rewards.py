"""The kinds of reward that `reward.kind` offers, in one table.

    python -m opd_async.config.rewards        print the rows of the table in the documentation

Schema, checks, actors and documentation read `REWARDS`. A kind is a member and a row here, and a rule in
`actors/rewards/rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RewardKind(StrEnum):
    """How a response is judged."""

    NONE = "none"
    MATH = "math"
    """1 where math-verify finds the label's value in the response, else 0."""
    EXACT_MATCH = "exact_match"
    """1 where the response ended and `evaluation.answer_pattern` finds the label, else 0."""
    PYTHON = "python"
    """A number that the user's own async function returns."""
    EPISODE = "episode"
    """What the episode at `rollout.function` says that it has earned."""

    @property
    def facts(self) -> RewardFacts:
        """What the rest of the program has to know of it."""
        return REWARDS[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFacts:
    """What the rest of the program has to know of a kind of reward, and what the documentation says of it."""

    label: bool = False
    """Whether the response is compared with the prompt's label, which must then be there."""
    pool: bool = True
    """Whether processes beside the rollout actors judge it."""
    function: bool = False
    """Whether it is the user's own function: `reward.function` names it, and `reward.concurrency` acts."""
    earns: str
    """What a response earns, as the documentation has it; empty for no reward."""


REWARDS: dict[RewardKind, RewardFacts] = {
    RewardKind.NONE: RewardFacts(pool=False, earns=""),
    RewardKind.MATH: RewardFacts(
        label=True,
        earns="1 where math-verify finds the label's value in it (`\\boxed{0.5}` for `\\frac{1}{2}`), else 0",
    ),
    RewardKind.EXACT_MATCH: RewardFacts(
        label=True,
        earns="1 where it ended by itself and the first group of `evaluation.answer_pattern` equals the label, else 0",
    ),
    RewardKind.PYTHON: RewardFacts(
        function=True,
        earns="what the `async def` function at `reward.function` returns, called with `prompt`, `response`, `label` "
        "and `metadata` by name",
    ),
    RewardKind.EPISODE: RewardFacts(
        pool=False,
        earns="what the episode at [`rollout.function`](hooks.md#an-episode) returns, or tells `session.finish`",
    ),
}


def documentation() -> list[str]:
    """The rows of the table of rewards, markdown."""
    return [f"| `{kind}` | {facts.earns} |" for kind, facts in REWARDS.items() if facts.earns]


if __name__ == "__main__":
    print("\n".join(documentation()))
