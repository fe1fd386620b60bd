"""Which token ids the models of a run share, and where their tokenizers disagree about one.

    rows of every model's table -> the fewest -> ids below it are shared: only these are sampled
    tokenizers of student and teacher -> ids of theirs with other tokens -> accepted by name, or refused

A table has rows beyond the tokens of its tokenizer, for alignment, and their number differs between the sizes of one
family: Qwen2.5 has 151,936 or 152,064 for 151,665 tokens. So tables may differ, and what must agree is the token behind
each id that the student can sample.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from opd_async.config.topology import ONE_TEACHER, Topology
from opd_async.data.model_folder import read_model, try_model
from opd_async.data.tokenizer import Tokenizer

_NAMED = 5
"""Differences that a message names."""


@dataclass(frozen=True, slots=True)
class Difference:
    """An id that stands for another token, or for none, at the teacher; None where a side has no token."""

    token_id: int
    student: str | None
    teacher: str | None

    def __str__(self) -> str:
        return f"{self.token_id} is {_quoted(self.student)} for the student and {_quoted(self.teacher)} for the teacher"


@dataclass(frozen=True, slots=True)
class Tables:
    """Rows of each model's table of tokens: embedding and LM head."""

    student: int
    teachers: dict[str, int]
    """By name, as in `Topology.teachers`; those whose `config.json` cannot be read are left out."""

    @property
    def shared(self) -> int:
        """Ids below this have a row in every table: these alone are sampled, in training and in evaluations."""
        return min([self.student, *self.teachers.values()])


def read_tables(topology: Topology) -> Tables:
    """Read the tables' rows from the `config.json` of student and teachers. Raises `InputError` for the student's."""
    models = {name: side.model for name, side in topology.teachers.items()}
    if topology.opd.in_learner and topology.models.teacher is not None:
        models[ONE_TEACHER] = topology.models.teacher
    teachers = {name: facts.vocab_size for name, model in models.items() if (facts := try_model(model.path))}
    return Tables(read_model(topology.models.student.path).vocab_size, teachers)


def differences(student: Tokenizer, teacher: Tokenizer, rows: int, accepted: Collection[str] = ()) -> list[Difference]:
    """List the ids at which the tokenizers disagree, ascending, but for those with a token among `accepted`.

    `rows` is the size of the smaller of the two tables. Ids below it count whichever side has a token there; at or
    beyond it, only the student's tokens do: the teacher cannot score them. Teacher's tokens beyond the student's table
    are no difference, since the student cannot sample them.
    """
    own, other = student.tokens(), teacher.tokens()
    ids = sorted(token_id for token_id in own.keys() | other.keys() if token_id < rows or token_id in own)
    found = [
        Difference(token_id, own.get(token_id), other.get(token_id) if token_id < rows else None) for token_id in ids
    ]
    return [
        one
        for one in found
        if one.student != one.teacher and one.student not in accepted and one.teacher not in accepted
    ]


def describe(found: Sequence[Difference]) -> str:
    """Name the first differences and count all of them, in words."""
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{'; '.join(map(str, found[:_NAMED]))}{more}"


def allowance(found: Sequence[Difference]) -> str:
    """Write what `models.allow_token_differences` would say of the first differences: a token for each."""
    tokens = [one.student if one.student is not None else one.teacher for one in found[:_NAMED]]
    return f"[{', '.join(_quoted(token) for token in tokens)}{', ...' if len(found) > _NAMED else ''}]"


def _quoted(token: str | None) -> str:
    return "no token" if token is None else repr(token)
