"""Evaluations on held-out prompts: the section `evaluation`, and the sets of prompts that it comes to.

    data.held_out, evaluation.sets.<name>  ->  EvaluationSet by name: its prompts, and everything about their responses

Whoever evaluates knows sets only. `data.held_out` is one of them, called `held_out`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from opd_async.config.inputs import PromptsSection
from opd_async.config.section import Positive, Section, Steps, Tokens

HELD_OUT = "held_out"
"""Name of the set that `data.held_out` is."""
SETS = "evaluation.sets"
"""Key of the others."""
Judge = Literal["answer", "reward", "teacher"]
ListLength = Annotated[int, Field(ge=0, le=4096)]
Temperature = Annotated[float, Field(gt=0.0)]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
_Value = TypeVar("_Value")


class EvaluationSetSection(PromptsSection):
    """Prompts of an evaluation set, and how responses to them are made and judged. A key left out is as in
    `evaluation`."""

    prompts: Positive | None = None
    """Prompts of the evaluations before and after training."""
    during_prompts: Positive | None = None
    """Prompts of the evaluations in between."""
    samples_per_prompt: Positive | None = None
    """Sampled responses to each prompt."""
    temperature: Temperature | None = None
    """Temperature of the sampled responses."""
    max_response_tokens: Tokens | None = None
    """Longest response."""
    judge: Judge | None = None
    """What makes a response right."""
    answer_pattern: str | None = None
    """Regular expression over the response text, for `judge: answer`."""
    teacher: bool | None = None
    """Evaluate the teacher on these prompts too."""
    teacher_topk: ListLength | None = None
    """For `judge: teacher`: how many of the likeliest tokens of both sides are compared."""
    teacher_prompt: bool | None = None
    """For `judge: teacher`: the teacher reads what it reads in training."""


class EvaluationSection(Section):
    """Evaluations on held-out prompts, before, during and after training: pass@1, or the distance to the teacher."""

    every_steps: Steps | None = None
    """Steps between evaluations. Null: only before and after training."""
    prompts: Positive = 1000
    """Prompts of the evaluations before and after training."""
    during_prompts: Positive = 256
    """Prompts of the evaluations in between."""
    samples_per_prompt: Positive = 1
    """Sampled responses to each prompt: their mean is avg@k. One more is greedy."""
    temperature: Temperature = 1.0
    """Temperature of the sampled responses. Nothing is trained on them, so it need not be 1."""
    max_response_tokens: Tokens | None = None
    """Longest response of an evaluation. Null: as in `rollout.sampling`."""
    judge: Judge = "answer"
    """What makes a response right: the answer pattern, or a positive reward. `teacher` needs no labels: it is the
    distance to the teacher on the sampled responses, at temperature 1. One in the learner can be asked where its
    weights do not move."""
    answer_pattern: str = r"(?s)^(.*)$"
    """Regular expression over the response text; its first group must equal the label."""
    teacher: bool = True
    """Evaluate the teacher too, where engines of its own score."""
    teacher_topk: ListLength = 0
    """For `judge: teacher`: compare so many of the likeliest tokens of teacher and student in each place, for reverse
    and forward KL. They are exact where it is the vocabulary or more, else bounds from below. 0: the sampled tokens
    only, for an estimate of the reverse KL."""
    teacher_prompt: bool = True
    """For `judge: teacher`: the teacher reads what `data.teacher_prompt` or `data.privileged_key` make of a held-out
    row, as in training. False: what the student reads."""
    sets: dict[SetName, EvaluationSetSection] = Field(default_factory=dict)
    """Several evaluation sets by name, beside `data.held_out`, each with a judge, a sampling and limits of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSet:
    """One set of held-out prompts with everything that holds for it."""

    name: str
    key: str
    """Of its prompts in the topology, dotted."""
    data: PromptsSection
    prompts: int
    during_prompts: int
    samples_per_prompt: int
    temperature: float
    max_response_tokens: int
    judge: Judge
    answer_pattern: str
    teacher: bool
    teacher_topk: int
    teacher_prompt: bool
    max_prompt_tokens: int
    """Longest prompt that leaves room for `max_response_tokens` in the student's context."""
    own: frozenset[str] = frozenset()
    """Keys that the set has written itself."""

    def where(self, key: str) -> str:
        """The dotted key in the topology that says what `key` is for this set."""
        return f"{self.key}.{key}" if key in self.own else f"evaluation.{key}"


def evaluation_sets(
    section: EvaluationSection, held_out: PromptsSection | None, response_tokens: int, context_tokens: int
) -> dict[str, EvaluationSet]:
    """Every set by name, `held_out` first.

    Responses that nothing else is said of have `response_tokens` at most; `context_tokens` is the student's. Where
    `evaluation.sets` has the name of `data.held_out` too, which the checks refuse, the latter stays.
    """
    named = [(name, f"{SETS}.{name}", one) for name, one in section.sets.items()]
    if held_out is not None:
        named.insert(0, (HELD_OUT, "data.held_out", EvaluationSetSection.model_construct(**dict(held_out))))
    sets: dict[str, EvaluationSet] = {}
    for name, key, own in named:
        sets.setdefault(name, _resolved(name, key, own, section, response_tokens, context_tokens))
    return sets


def _resolved(
    name: str,
    key: str,
    own: EvaluationSetSection,
    section: EvaluationSection,
    response_tokens: int,
    context_tokens: int,
) -> EvaluationSet:
    longest = own.max_response_tokens or section.max_response_tokens or response_tokens
    return EvaluationSet(
        name=name,
        key=key,
        data=own,
        prompts=_either(own.prompts, section.prompts),
        during_prompts=_either(own.during_prompts, section.during_prompts),
        samples_per_prompt=_either(own.samples_per_prompt, section.samples_per_prompt),
        temperature=_either(own.temperature, section.temperature),
        max_response_tokens=longest,
        judge=_either(own.judge, section.judge),
        answer_pattern=_either(own.answer_pattern, section.answer_pattern),
        teacher=_either(own.teacher, section.teacher),
        teacher_topk=_either(own.teacher_topk, section.teacher_topk),
        teacher_prompt=_either(own.teacher_prompt, section.teacher_prompt),
        max_prompt_tokens=context_tokens - longest,
        own=frozenset(field for field in _SETTINGS if getattr(own, field) is not None),
    )


_SETTINGS = tuple(name for name in EvaluationSetSection.model_fields if name not in PromptsSection.model_fields)


def _either(own: _Value | None, shared: _Value) -> _Value:
    return shared if own is None else own
