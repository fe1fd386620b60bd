"""Check evaluation sets: that each has what its judge needs, and a name of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator

from opd_async.config.evaluating import HELD_OUT, SETS, EvaluationSet, evaluation_sets
from opd_async.config.inputs import PromptsSection
from opd_async.config.rewards import RewardKind
from opd_async.config.topology import Topology
from opd_async.data.rows import data_files
from opd_async.errors import InputError


def evaluation_problems(topology: Topology) -> list[str]:
    """List what is wrong with `evaluation` and its sets, files and labels apart; what several share is listed once."""
    found = [problem for one in _sets(topology) for problem in _set_problems(topology, one)]
    if topology.data.held_out is not None and HELD_OUT in topology.evaluation.sets:
        found.append(
            f"{SETS}.{HELD_OUT}: that is the name of data.held_out; write another name, or remove data.held_out"
        )
    return list(dict.fromkeys(found))


def set_file_problems(topology: Topology) -> Iterator[str]:
    """List the sets whose files are not there."""
    for one in topology.evaluation_sets.values():
        try:
            data_files(one.data.path)
        except InputError as error:
            yield f"{one.key}.path: {error}"


def answer_problems(topology: Topology) -> list[str]:
    """List the answer patterns that cannot be used, of sets and of the section, which a reward may use too."""
    sets = topology.evaluation_sets.values()
    patterns = {"evaluation.answer_pattern": topology.evaluation.answer_pattern}
    patterns |= {one.where("answer_pattern"): one.answer_pattern for one in sets}
    return [problem for key, pattern in patterns.items() if (problem := _pattern_problem(key, pattern)) is not None]


def _pattern_problem(key: str, pattern: str) -> str | None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        return f"{key}: {pattern!r} is not a regular expression ({error}); write one with a group"
    return None if groups else f"{key}: {pattern!r} has no group; put the answer in parentheses, as in ^(.*)$"


def _sets(topology: Topology) -> list[EvaluationSet]:
    """The sets; without any, one that stands for what the section says."""
    longest, context = topology.rollout.sampling.max_response_tokens, topology.engines.student.context_tokens
    stand_in = PromptsSection.model_construct()
    some = topology.evaluation_sets or evaluation_sets(topology.evaluation, stand_in, longest, context)
    return list(some.values())


def _set_problems(topology: Topology, one: EvaluationSet) -> Iterator[str]:
    context, judge = topology.engines.student.context_tokens, one.where("judge")
    if one.judge == "reward" and topology.reward.kind is RewardKind.NONE:
        yield f"{judge}: reward, but there is none; write reward.kind, or answer"
    opd = topology.opd
    if one.judge == "teacher" and opd.of_itself and opd.self.weights != "frozen":
        yield (
            f"{judge}: teacher, but with opd.self.weights {opd.self.weights} the teacher moves with the student, "
            "and a distance to it says little; write answer or reward, or opd.self.weights: frozen"
        )
    elif one.judge == "teacher" and not topology.teachers and not opd.in_learner:
        yield f"{judge}: teacher, but there is none to be asked; write answer or reward"
    if one.judge == "teacher" and topology.rollout.function is not None:
        yield (
            f"{judge}: teacher, which compares a response of the student alone, but rollout.function makes episodes "
            "with given tokens in them; write reward or answer"
        )
    if one.judge == "teacher" and one.temperature != 1.0:
        yield (
            f"{one.where('temperature')}: {one.temperature:g}, but {judge}: teacher compares distributions at "
            "temperature 1; write 1"
        )
    if "answer_pattern" in one.own and one.judge != "answer":
        yield f"{one.where('answer_pattern')}: only for judge answer, this is {one.judge}; remove it"
    for key in ("teacher_topk", "teacher_prompt"):
        if key in one.own and one.judge != "teacher":
            yield f"{one.where(key)}: only for judge teacher, this is {one.judge}; remove it"
    written = "max_response_tokens" in one.own or topology.evaluation.max_response_tokens
    if written and one.max_response_tokens >= context:
        yield (
            f"{one.where('max_response_tokens')}: {one.max_response_tokens} leaves no room for a prompt in "
            f"engines.student.context_tokens {context}; write less than {context}"
        )
