"""Check that responses can be judged as the topology says: by rewards, and by labels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

from opd_async.checks.evaluation import answer_problems
from opd_async.config.rewards import RewardKind
from opd_async.config.topology import PromptsSection, Topology
from opd_async.data.prompts import PromptSet
from opd_async.data.rows import named
from opd_async.errors import InputError
from opd_async.hooks import away_from_here

LOAD_DEADLINE_S = 60.0


def reward_problems(topology: Topology) -> Iterator[str]:
    """List what is wrong with `reward` and answer patterns; loads the rule in a process of its own, as actors do."""
    answers = answer_problems(topology)
    yield from answers
    reward = topology.reward
    if reward.kind is RewardKind.EPISODE and topology.rollout.function is None:
        yield (
            "reward.kind: episode, but no rollout.function says what one earns; name your episode there, or write "
            "another kind"
        )
    if not reward.kind.facts.function and reward.function is not None:
        yield f"reward.function: only for kind python, this is {reward.kind}; remove it"
    elif reward.kind.facts.function and reward.function is None:
        yield "reward.function: missing; write module:function, the path of an `async def` that returns a number"
    elif reward.kind.facts.pool and not answers and (problem := _unloadable(topology)):
        yield problem


def require_labels(prompts: PromptSet, section: PromptsSection, rule: str) -> None:
    """Raise `InputError` if a prompt has no label, with which `rule` compares: responses would always be "wrong"."""
    if missing := prompts.unlabelled():
        without = ", or write judge: teacher, which needs none" if rule.startswith("evaluation.") else ""
        raise InputError(
            f"{named(section.path)}: {missing} of {len(prompts.prompts)} prompts have no label under "
            f"{section.label_key!r}, which {rule} compares responses with; set label_key, or remove these "
            f"prompts{without}"
        )


def _unloadable(topology: Topology) -> str | None:
    """Say why the rule cannot be loaded; None if it can."""
    reward = topology.reward
    rule = (reward.kind.value, reward.function or "", topology.evaluation.answer_pattern)
    try:
        loaded = subprocess.run(
            [sys.executable, "-m", "opd_async.actors.rewards.rules", *rule],
            capture_output=True,
            text=True,
            timeout=LOAD_DEADLINE_S,
            env={**os.environ, **away_from_here()},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"reward.kind: {reward.kind} was not loaded within {LOAD_DEADLINE_S:.0f} s; import less in its module"
    lines = loaded.stderr.strip().splitlines()
    return None if loaded.returncode == 0 else (lines[-1] if lines else f"reward.kind: {reward.kind} cannot be loaded")
