"""A teacher in the learner is asked about an evaluation's responses: in turns, and each answer to its own response."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from opd_async.config.evaluating import EvaluationSet, evaluation_sets
from opd_async.config.topology import EvaluationSection, PromptsSection
from opd_async.data.prompts import Prompt
from opd_async.errors import RoleError
from opd_async.run import consulting
from opd_async.run.consulting import Consulting
from opd_async.run.evaluation_responses import Response
from opd_async.transport.bounds import problem
from opd_async.transport.messages import AskTeacher, EvalDone, LearnerReply

VOCAB = 6
BEYOND = 8
"""Ids of the teacher, of which the student has the first `VOCAB`."""


def distribution(seed: int, ids: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Logprobs of `ids` tokens, the same for the same seed."""
    values = np.random.default_rng(seed).normal(size=ids)
    return values - np.log(np.exp(values).sum())


def in_place(
    text: np.ndarray[tuple[int], np.dtype[np.int32]], place: int, ids: int
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What a model of `ids` tokens says in a place: it depends on everything before."""
    return distribution(int(text[:place] @ np.arange(1, place + 1)) + 100 * ids, ids)


class Learner:
    """Says what a teacher of `BEYOND` tokens would."""

    def __init__(self) -> None:
        self.asked: list[AskTeacher] = []
        self.error: str | None = None

    async def ask(self, command: AskTeacher) -> LearnerReply:
        self.asked.append(command)
        assert problem(command) is None
        await asyncio.sleep(0)
        sampled, ids, logprobs = [], [], []
        texts = np.split(command.token_ids, np.cumsum(command.sequence_lengths)[:-1])
        for text, prompt in zip(texts, command.prompt_lengths.tolist(), strict=True):
            for place in range(prompt, len(text)):
                told = in_place(text, place, BEYOND)
                best = np.argsort(-told)[: command.topk]
                sampled.append(told[text[place]])
                ids.append(best)
                logprobs.append(told[best])
        lists = {}
        if command.topk:
            lists = {"topk_ids": np.array(ids, np.int32), "topk_logprobs": np.array(logprobs, np.float32)}
        reply = LearnerReply("AskTeacher", 3, self.error, {}, teacher_logprobs=np.array(sampled, np.float32), **lists)
        assert problem(reply) is None
        return reply


def evaluated(topk: int) -> EvaluationSet:
    section = EvaluationSection.model_validate({"judge": "teacher", "teacher_topk": topk})
    return evaluation_sets(section, PromptsSection(path=Path("x.jsonl")), 32, 64)["held_out"]


def response(number: int, count: int, topk: int) -> Response:
    """A response of `count` tokens with the student's part; odd ones have a prompt that only the teacher reads."""
    own = np.array([1, number % VOCAB], np.int32)
    prompt = Prompt(number, own, "", {}, teacher_ids=np.array([2, 4, 5], np.int32) if number % 2 else None)
    ids = np.random.default_rng(number).integers(0, VOCAB, count).astype(np.int32)
    text = np.concatenate([own, ids])
    told = np.array([in_place(text, place, VOCAB) for place in range(2, len(text))]).reshape(count, VOCAB)
    best = np.argsort(-told, axis=1)[:, :topk]
    lists = {
        "student_topk_ids": best.astype(np.int32),
        "student_topk_logprobs": np.take_along_axis(told, best, 1).astype(np.float32),
    }
    done = EvalDone(
        sample_id=number,
        finish="stop",
        weight_version=3,
        token_ids=ids,
        student_logprobs=told[np.arange(count), ids].astype(np.float32),
        **(lists if topk else {}),
    )
    assert problem(done) is None
    return prompt, done


def exact(one: Response) -> tuple[list[float], list[float]]:
    """The teacher's logprobs of a response and its reverse KL in each place, from whole distributions."""
    prompt, done = one
    read = prompt.token_ids if prompt.teacher_ids is None else prompt.teacher_ids
    texts = [np.concatenate([ids, done.token_ids]) for ids in (prompt.token_ids, read)]
    logprobs, reverse = [], []
    for at, token in enumerate(done.token_ids.tolist()):
        p = in_place(texts[0], len(prompt.token_ids) + at, VOCAB)
        q = in_place(texts[1], len(read) + at, BEYOND)
        logprobs.append(float(q[token]))
        reverse.append(float((np.exp(p) * (p - q[:VOCAB])).sum()))
    return logprobs, reverse


@pytest.mark.parametrize(("most", "turns"), [(consulting.MOST_NUMBERS, 1), (30, 4)])
def test_every_response_gets_its_own_answer(monkeypatch: pytest.MonkeyPatch, most: int, turns: int) -> None:
    monkeypatch.setattr(consulting, "MOST_NUMBERS", most)
    learner, responses = Learner(), [response(number, count, BEYOND) for number, count in enumerate([3, 1, 0, 4, 2])]
    found = asyncio.run(Consulting(learner, VOCAB).complete(evaluated(BEYOND), responses))
    assert len(learner.asked) == turns
    assert found[2] == responses[2]  # nothing to be asked
    for given, (prompt, done) in zip(responses, found, strict=True):
        assert prompt is given[0] and (done.token_ids == given[1].token_ids).all()
        if len(done.token_ids):
            logprobs, reverse = exact(given)
            np.testing.assert_allclose(done.teacher_logprobs, logprobs, atol=1e-6)
            np.testing.assert_allclose(done.reverse_kl, reverse, atol=1e-4)
            assert done.forward_kl is not None and (done.forward_kl > 0.0).all()
            assert done.student_topk_ids is None


def test_without_lists_the_sampled_tokens_are_enough() -> None:
    learner, responses = Learner(), [response(number, 3, 0) for number in range(3)]
    found = asyncio.run(Consulting(learner, VOCAB).complete(evaluated(0), responses))
    for given, (_, done) in zip(responses, found, strict=True):
        np.testing.assert_allclose(done.teacher_logprobs, exact(given)[0], atol=1e-6)
        assert done.reverse_kl is None


def test_what_no_engine_has_said_is_not_asked() -> None:
    """The response counts as not scored then."""
    learner, (prompt, done) = Learner(), response(0, 3, 4)
    parts = [replace(done, student_logprobs=None), replace(done, student_topk_ids=None, student_topk_logprobs=None)]
    responses = [(prompt, part) for part in parts]
    assert asyncio.run(Consulting(learner, VOCAB).complete(evaluated(4), responses)) == responses
    assert not learner.asked


def test_sets_are_asked_one_after_the_other() -> None:
    """The learner's answers have no number: of two commands of one kind, one would get the other's."""
    learner, under_way = Learner(), 0

    class Slow(Learner):
        async def ask(self, command: AskTeacher) -> LearnerReply:
            nonlocal under_way
            under_way += 1
            assert under_way == 1
            for _ in range(5):
                await asyncio.sleep(0)
            under_way -= 1
            return await learner.ask(command)

    async def run() -> None:
        consulted = Consulting(Slow(), VOCAB)
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(consulted.complete(evaluated(0), [response(number, 2, 0)]))

    asyncio.run(run())
    assert len(learner.asked) == 3


def test_lists_that_are_missing_are_no_estimate() -> None:
    """Sampled tokens alone would be another figure under the same name."""

    class Terse(Learner):
        async def ask(self, command: AskTeacher) -> LearnerReply:
            return await super().ask(replace(command, topk=0))

    with pytest.raises(RoleError, match="could not say what its teacher thinks of held_out"):
        asyncio.run(Consulting(Terse(), VOCAB).complete(evaluated(4), [response(0, 3, 4)]))


def test_a_learner_that_cannot_say_ends_the_evaluation() -> None:
    learner = Learner()
    learner.error = "out of memory"
    with pytest.raises(RoleError, match="could not say what its teacher thinks of held_out: out of memory"):
        asyncio.run(Consulting(learner, VOCAB).complete(evaluated(0), [response(0, 3, 0)]))
