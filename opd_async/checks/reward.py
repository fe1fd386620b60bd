"""Check that responses can be judged as the topology says: by rewards, and by answers in evaluations."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

from opd_async.config.rewards import RewardKind
from opd_async.config.topology import PromptsSection, Topology
from opd_async.data.prompts import PromptSet
from opd_async.data.rows import named
from opd_async.errors import InputError
from opd_async.hooks import away_from_here

LOAD_DEADLINE_S = 60.0


def reward_problems(topology: Topology) -> Iterator[str]:
    """List what is wrong with `reward` and `evaluation`; loads the rule in a process of its own, as actors do."""
    answers = list(_answer_problems(topology))
    yield from answers
    yield from _evaluation_problems(topology)
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


def require_labels(prompts: PromptSet, section: PromptsSection, kind: RewardKind | None) -> None:
    """Raise `InputError` if responses are compared with labels and a prompt has none: they would always be "wrong".

    `kind` is the rule that judges; None stands for `evaluation.judge: answer`, which compares with the label itself.
    """
    if kind is not None and not kind.facts.label:
        return
    if missing := prompts.unlabelled():
        rule = "evaluation.judge answer" if kind is None else f"reward.kind {kind}"
        raise InputError(
            f"{named(section.path)}: {missing} of {len(prompts.prompts)} prompts have no label under "
            f"{section.label_key!r}, which {rule} compares responses with; set label_key, or remove these prompts"
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


def _answer_problems(topology: Topology) -> Iterator[str]:
    pattern = topology.evaluation.answer_pattern
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        yield f"evaluation.answer_pattern: {pattern!r} is not a regular expression ({error}); write one with a group"
        return
    if groups == 0:
        yield f"evaluation.answer_pattern: {pattern!r} has no group; put the answer in parentheses, as in ^(.*)$"


def _evaluation_problems(topology: Topology) -> Iterator[str]:
    evaluation, context = topology.evaluation, topology.engines.student.context_tokens
    if evaluation.judge == "reward" and topology.reward.kind is RewardKind.NONE:
        yield "evaluation.judge: reward, but there is none; write reward.kind, or answer"
    if evaluation.judge == "teacher" and not topology.teachers:
        yield ("evaluation.judge: teacher, but no teacher has engines of its own to be asked; write answer or reward")
    if evaluation.judge == "teacher" and evaluation.temperature != 1.0:
        yield (
            f"evaluation.temperature: {evaluation.temperature:g}, but evaluation.judge: teacher compares distributions "
            "at temperature 1; write 1"
        )
    if (evaluation.max_response_tokens or 0) >= context:
        yield (
            f"evaluation.max_response_tokens: {evaluation.max_response_tokens} leaves no room for a prompt in "
            f"engines.student.context_tokens {context}; write less than {context}"
        )
