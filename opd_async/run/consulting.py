"""Ask the teacher in the learner what it thinks of an evaluation's responses; engines have said the student's part.

    responses with the student's logprobs (and likeliest tokens) -> AskTeacher -> the teacher's -> both divergences

Its weights stay as they are, so that it does not matter which step the learner is at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from opd_async.config.evaluating import EvaluationSet
from opd_async.data.prompts import Prompt
from opd_async.errors import RoleError
from opd_async.estimators.topk import TopK
from opd_async.estimators.topk_kl import divergences
from opd_async.run.evaluation_responses import Response
from opd_async.transport.messages import AskTeacher, EvalDone, LearnerReply

MOST_NUMBERS = 1 << 22
"""Logprobs in one answer: 16 MiB of them, and as much of ids."""


class Learner(Protocol):
    """Who is asked."""

    def ask(self, command: AskTeacher) -> Awaitable[LearnerReply]:
        """The answer; raises `DeadlineError`. One command of a kind at a time."""


class Consulting:
    """Completes responses of evaluations, one set after the other."""

    def __init__(self, learner: Learner, vocab: int) -> None:
        """`vocab`: ids below it are sampled; a teacher may have more."""
        self._learner, self._vocab = learner, vocab
        self._one = asyncio.Lock()

    async def complete(self, one: EvaluationSet, responses: Sequence[Response]) -> list[Response]:
        """The responses to a set, with what the teacher says of them; those that are empty, or whose student's part is
        missing, as they are.

        Raises `DeadlineError` for a silent learner, `RoleError` for one that cannot say. On cancel: as
        `LearnerCommands.ask`.
        """
        found, topk = list(responses), one.teacher_topk
        whole = [at for at, (_, done) in enumerate(found) if _is_whole(done, topk)]
        async with self._one:
            for part in _parts([len(found[at][1].token_ids) for at in whole], 1 + topk):
                places = [whole[at] for at in part]
                answers = await self._ask([found[at] for at in places], one)
                for at, done in zip(places, answers, strict=True):
                    found[at] = (found[at][0], done)
        return found

    async def _ask(self, responses: Sequence[Response], one: EvaluationSet) -> list[EvalDone]:
        prompts = [_read(prompt) for prompt, _ in responses]
        texts = [np.concatenate([ids, done.token_ids]) for ids, (_, done) in zip(prompts, responses, strict=True)]
        command = AskTeacher(
            token_ids=np.concatenate(texts).astype(np.int32),
            sequence_lengths=np.array([len(text) for text in texts], np.int32),
            prompt_lengths=np.array([len(ids) for ids in prompts], np.int32),
            topk=one.teacher_topk,
        )
        reply = await self._learner.ask(command)
        expected, said = sum(len(done.token_ids) for _, done in responses), reply.teacher_logprobs
        without_lists = one.teacher_topk > 0 and reply.topk_ids is None
        if reply.error is not None or said is None or len(said) != expected or without_lists:
            raise RoleError(f"the learner could not say what its teacher thinks of {one.name}: {reply.error}")
        answers, start = [], 0
        for _, done in responses:
            end = start + len(done.token_ids)
            answers.append(await asyncio.to_thread(self._compared, done, reply, slice(start, end)))
            start = end
        return answers

    def _compared(self, done: EvalDone, reply: LearnerReply, rows: slice) -> EvalDone:
        """A response with the teacher's part of it; long lists take a while."""
        own, its = done.student_logprobs, reply.teacher_logprobs
        assert own is not None and its is not None
        done = replace(done, teacher_logprobs=its[rows])
        student = TopK.of(done.student_topk_ids, done.student_topk_logprobs)
        teacher = TopK.of(reply.topk_ids, reply.topk_logprobs)
        if student is None or teacher is None:
            return done
        lists = (student, teacher.rows(rows.start, rows.stop).below(self._vocab))
        found = divergences(*lists, done.token_ids, own, its[rows])
        reverse, forward = found.reverse.astype(np.float32), found.forward.astype(np.float32)
        return replace(done, reverse_kl=reverse, forward_kl=forward, student_topk_ids=None, student_topk_logprobs=None)


def _is_whole(done: EvalDone, topk: int) -> bool:
    lists = not topk or done.student_topk_ids is not None
    return len(done.token_ids) > 0 and done.student_logprobs is not None and lists


def _read(prompt: Prompt) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """What the teacher reads before the response."""
    return prompt.token_ids if prompt.teacher_ids is None else prompt.teacher_ids


def _parts(tokens: Sequence[int], numbers: int) -> Iterator[list[int]]:
    """Indices of responses of so many `tokens`, with `numbers` to say of each, in turns that are not too large."""
    part: list[int] = []
    held = 0
    for at, count in enumerate(tokens):
        if part and held + count * numbers > MOST_NUMBERS:
            yield part
            part, held = [], 0
        part.append(at)
        held += count * numbers
    if part:
        yield part
