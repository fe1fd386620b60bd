"""Evaluations: how many responses, with which settings, and what makes one right."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from eval_actors import OneActor
from small_runs import make_model

from opd_async.config.evaluating import evaluation_sets
from opd_async.config.topology import EvaluationSection, PromptsSection
from opd_async.data.prompts import Prompt
from opd_async.data.tokenizer import Tokenizer
from opd_async.run.evaluator import Evaluator
from opd_async.telemetry.progress import compared
from opd_async.telemetry.report import Evaluation, wilson_interval
from opd_async.transport.messages import EvalDone, Lease, LeaseKind

PROMPTS = [Prompt(index, np.array([1, 3], np.int32), "b", {"row": index}) for index in range(5)]
RIGHT = np.array([4, 2], np.int32)  # "b" and the stop token
WRONG = np.array([5, 2], np.int32)
Answer = Callable[[Lease], EvalDone]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(make_model(tmp_path / "model"))


def evaluate(
    tokenizer: Tokenizer, answer: Answer, teacher: str | None = None, **section: object
) -> tuple[Evaluation, list[Lease]]:
    """One evaluation of four prompts, every lease answered at once."""
    leases: list[Lease] = []

    def send(lease: Lease) -> None:
        leases.append(lease)
        evaluator.deliver(answer(lease))

    settings = EvaluationSection.model_validate(section)
    sets = evaluation_sets(settings, PromptsSection(path=Path("x.jsonl")), 32, 64)
    prompts = PROMPTS if teacher is None else [replace(prompt, teacher=teacher) for prompt in PROMPTS]
    evaluator = Evaluator(sets, {"held_out": prompts}, tokenizer, slots=3, actors=OneActor(send))
    kind = LeaseKind.EVAL_STUDENT if teacher is None else LeaseKind.EVAL_TEACHER

    async def run() -> Evaluation:
        return await evaluator.evaluate(kind, "held_out", 4, 7, 10.0, evaluator.slots(), teacher)

    return asyncio.run(run()), leases


def done(lease: Lease, ids: np.ndarray[tuple[int], np.dtype[np.int32]], reward: float | None = None) -> EvalDone:
    return EvalDone(sample_id=lease.sample_id, finish="stop", weight_version=7, token_ids=ids, reward=reward)


def test_avg_at_k_with_settings_of_its_own(tokenizer: Tokenizer) -> None:
    """Of three samples per prompt, those of even prompts are right; greedy ones are all right."""

    def answer(lease: Lease) -> EvalDone:
        return done(lease, RIGHT if lease.prompt_id % 2 == 0 or lease.temperature == 0.0 else WRONG)

    found, leases = evaluate(tokenizer, answer, samples_per_prompt=3, temperature=0.6, max_response_tokens=20)
    assert (found.prompts, found.samples_per_prompt, found.temperature, found.step) == (4, 3, 0.6, 7)
    assert (found.pass_at_1, found.pass_at_1_greedy) == (0.5, 1.0)
    assert found.pass_at_1_interval == wilson_interval(2, 4)
    assert [lease.temperature for lease in leases] == [0.6] * 12 + [0.0] * 4
    assert {lease.max_tokens for lease in leases} == {20}
    assert sorted(lease.prompt_id for lease in leases[:12]) == sorted([0, 1, 2, 3] * 3)
    assert len({lease.sample_id for lease in leases}) == 16


def test_an_evaluation_asks_for_answers_not_for_a_teachers_opinion(tokenizer: Tokenizer) -> None:
    """A reward that comes along changes nothing, unless evaluations are judged by it; a teacher never does."""
    wrong_but_praised, leases = evaluate(tokenizer, lambda lease: done(lease, WRONG, 1.0))
    assert wrong_but_praised.pass_at_1 == 0.0 and wrong_but_praised.unjudged == 0
    assert {(lease.max_tokens, lease.evaluation_set) for lease in leases} == {(32, "held_out")}
    praised, leases = evaluate(tokenizer, lambda lease: done(lease, WRONG, 1.0), judge="reward")
    assert praised.pass_at_1 == praised.pass_at_1_greedy == 1.0
    assert leases[1].metadata == '{"row": 1}'


def test_responses_that_could_not_be_judged_are_counted(tokenizer: Tokenizer) -> None:
    def answer(lease: Lease) -> EvalDone:
        return done(lease, RIGHT, {0: 1.0, 1: -1.0, 2: 0.0}.get(lease.prompt_id))

    found, _ = evaluate(tokenizer, answer, judge="reward")
    assert (found.pass_at_1, found.unjudged) == (0.25, 2)


def test_a_teacher_judges_without_labels(tokenizer: Tokenizer) -> None:
    """The reverse KL is a mean over tokens; its interval is that of a ratio of sums over responses."""
    lengths, gaps = [1, 2, 3, 4], [0.5, 1.0, -0.25, 0.75]

    def answer(lease: Lease) -> EvalDone:
        length, gap = lengths[lease.prompt_id], gaps[lease.prompt_id]
        student = np.full(length, -1.0, np.float32)
        finish = "length" if lease.prompt_id == 0 else "stop"
        return EvalDone(
            sample_id=lease.sample_id,
            finish=finish,
            weight_version=7,
            token_ids=np.full(length, 4, np.int32),
            student_logprobs=student,
            teacher_logprobs=student - gap,
        )

    found, leases = evaluate(tokenizer, answer, judge="teacher")
    assert [lease.temperature for lease in leases] == [1.0] * 4  # nothing greedy
    assert (found.pass_at_1, found.pass_at_1_greedy, found.unjudged) == (None, None, 0)
    mean = (0.5 + 2.0 - 0.75 + 3.0) / 10
    assert found.reverse_kl == pytest.approx(mean)
    rest = [gap * length - mean * length for gap, length in zip(gaps, lengths, strict=True)]
    error = 1.959963985 * (sum(one * one for one in rest) * 4 / 3) ** 0.5 / 10
    assert found.reverse_kl_interval == pytest.approx((mean - error, mean + error))
    assert (found.response_tokens, found.ended_share) == (2.5, 0.75)


def test_likeliest_tokens_of_both_sides_give_both_divergences(tokenizer: Tokenizer) -> None:
    """In the place of the estimate, which the logprobs would give."""

    def answer(lease: Lease) -> EvalDone:
        count = lease.prompt_id + 1
        logprobs = np.full(count, -1.0, np.float32)
        kl = np.linspace(0.0, 1.0, count, dtype=np.float32)
        scores = {"student_logprobs": logprobs, "teacher_logprobs": logprobs, "reverse_kl": kl, "forward_kl": 2 * kl}
        scores = {} if lease.prompt_id == 3 else scores
        ids = np.full(count, 4, np.int32)
        return EvalDone(sample_id=lease.sample_id, finish="stop", weight_version=7, token_ids=ids, **scores)

    found, _ = evaluate(tokenizer, answer, judge="teacher", teacher_topk=16)
    assert (found.teacher_topk, found.unjudged) == (16, 1)
    assert found.reverse_kl == pytest.approx(2.5 / 6) and found.forward_kl == pytest.approx(5.0 / 6)
    assert found.forward_kl_interval is not None and found.forward_kl_interval[0] < 5.0 / 6
    assert compared(found).startswith("reverse KL 0.4167 (") and ", forward KL 0.8333 on 4 held-out" in compared(found)


def test_responses_that_no_teacher_scored_are_counted(tokenizer: Tokenizer) -> None:
    found, _ = evaluate(tokenizer, lambda lease: done(lease, RIGHT), judge="teacher")
    assert (found.reverse_kl, found.reverse_kl_interval, found.unjudged) == (None, None, 4)
    assert compared(found) == "no response was scored on 4 held-out prompts, length 2.0, 100 % ended, 4 not scored"


@pytest.mark.parametrize("judge", ["answer", "reward"])
def test_a_teacher_that_is_never_right_is_a_warning_that_shows_why(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, judge: str
) -> None:
    found, _ = evaluate(tokenizer, lambda lease: done(lease, WRONG, -1.0), teacher="teacher", judge=judge)
    assert found.pass_at_1 == found.pass_at_1_greedy == 0.0
    (record,) = caplog.records
    text = record.getMessage()
    assert record.levelname == "WARNING" and "the teacher answers none of 4 held-out prompts" in text
    assert "prompt '<bos>a', response 'c<eos>' (ended by stop), label 'b'" in text
    assert ("evaluation.answer_pattern" in text) == (judge == "answer") and "\n" not in text


def test_who_is_right_once_is_no_warning(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    def once(lease: Lease) -> EvalDone:
        return done(lease, RIGHT if lease.prompt_id == 2 and lease.temperature else WRONG)

    evaluate(tokenizer, once, teacher="teacher")
    evaluate(tokenizer, lambda lease: done(lease, WRONG))  # an untrained student may be wrong everywhere
    assert not caplog.records
