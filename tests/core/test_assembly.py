"""The assembler, case by case; random schedules are in test_staleness.py."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from scored_chunks import PROMPT, context_to, held, scored, token_ids

from opd_async.scheduling.assembly import Assembler, Sample, Verdict
from opd_async.scheduling.intervals import IntervalSet
from opd_async.transport.owed import OwedSample

NONE = np.zeros(0, np.float32)


def assembler() -> Assembler:
    fresh = Assembler()
    fresh.start_at(0)
    return fresh


def test_chunks_in_order_become_one_segment() -> None:
    box = assembler()
    held(box, 3, 4)
    held(box, 3, 6, weight_version=1)
    held(box, 3, 7, weight_version=1, finish="stop")
    segment = box.take(box.samples[3])
    assert segment is not None
    assert (segment.start, segment.end, segment.complete, segment.prompt_tokens) == (0, 7, True, 2)
    assert segment.token_ids.tolist() == context_to(7).tolist()
    assert segment.versions.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert segment.behaviour_logprobs.tolist() == [-0.5] * 7
    assert segment.teacher_logprobs.tolist() == [-0.25] * 7
    assert 3 in box.completed
    assert not box.samples


def test_a_cut_takes_what_is_there_and_the_rest_follows_with_its_context() -> None:
    box = assembler()
    held(box, 3, 4)
    first = box.take(box.samples[3])
    assert first is not None
    assert not first.complete
    assert box.samples[3].untrained_tokens == 0
    held(box, 3, 6, finish="length")
    second = box.take(box.samples[3])
    assert second is not None
    assert (second.start, second.end, second.complete) == (4, 6, True)
    assert second.token_ids.tolist() == context_to(6).tolist()
    assert len(second.versions) == len(second.teacher_logprobs) == 2


def test_early_chunks_wait_for_the_gap_to_close() -> None:
    box = assembler()
    held(box, 3, 2)
    assert box.add(scored(3, 4, 6)) is Verdict.EARLY
    assert box.add(scored(3, 6, 6, finish="stop")) is Verdict.EARLY
    assert box.samples[3].scored_end == 2
    assert box.add(scored(3, 2, 4)) is Verdict.ACCEPTED
    assert box.samples[3].scored_end == 6
    assert box.samples[3].finish == "stop"
    assert not box.samples[3].early


def test_duplicates_change_nothing() -> None:
    box = assembler()
    held(box, 3, 2)
    assert box.add(scored(3, 0, 2, context=True)) is Verdict.DUPLICATE
    assert box.add(scored(3, 4, 6)) is Verdict.EARLY
    assert box.add(scored(3, 4, 6)) is Verdict.DUPLICATE
    held(box, 3, 4)
    assert box.samples[3].scored_end == 6
    held(box, 3, 6 + 1, finish="stop")
    assert box.add(scored(3, 7, 9)) is Verdict.DUPLICATE
    box.take(box.samples[3])
    assert box.add(scored(3, 0, 2, context=True)) is Verdict.DUPLICATE
    assert not box.samples


def test_an_empty_response_is_complete_without_a_segment() -> None:
    box = assembler()
    held(box, 3, 0, finish="stop")
    sample = box.samples[3]
    assert sample.untrained_tokens == 0
    assert sample.response().tolist() == []
    assert box.take(sample) is None
    assert 3 in box.completed


def test_an_end_that_comes_alone_completes_a_trained_response() -> None:
    box = assembler()
    held(box, 3, 4)
    box.take(box.samples[3])
    assert box.add(scored(3, 4, 4, finish="stop")) is Verdict.ACCEPTED
    assert box.take(box.samples[3]) is None
    assert 3 in box.completed


def test_a_beginning_without_context_is_an_orphan() -> None:
    box = assembler()
    assert box.add(scored(3, 0, 2)) is Verdict.ORPHAN
    assert box.add(scored(3, 2, 4, context=True)) is Verdict.ORPHAN
    assert not box.samples


@pytest.mark.parametrize(
    "fields",
    [
        {"teacher_logprobs": np.zeros(3, np.float32)},
        {"behaviour_logprobs": np.zeros(1, np.float32)},
        {"teacher_logprobs": np.array([0.0, np.nan], np.float32)},
        {"behaviour_logprobs": np.array([-np.inf, 0.0], np.float32)},
        {"teacher_logprobs": np.array([0.5, 0.0], np.float32)},
        {"context": np.zeros(3, np.int32)},
        {"start": -1},
        {"token_ids": token_ids(0, 0), "behaviour_logprobs": NONE, "teacher_logprobs": NONE},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_malformed_chunks_are_refused(fields: dict[str, Any]) -> None:
    box = assembler()
    assert box.add(dataclasses.replace(scored(3, 0, 2, context=True), **fields)) is Verdict.MALFORMED
    assert not box.samples


def topk(*probabilities: float, rows: int = 2) -> dict[str, Any]:
    """The same top-k at every position: ids 5, 6, ..."""
    ids = np.tile(np.arange(5, 5 + len(probabilities), dtype=np.int32), (rows, 1))
    return {"topk_ids": ids, "topk_logprobs": np.log(np.tile(np.float32(probabilities), (rows, 1)))}


def test_the_top_k_stays_with_its_tokens() -> None:
    box = Assembler(topk=2)
    box.start_at(0)
    held(box, 3, 2, **topk(0.5, 0.25))
    held(box, 3, 3, **topk(0.6, 0.3, rows=1))
    held(box, 3, 3, finish="stop")
    segment = box.take(box.samples[3])
    assert segment is not None and segment.topk is not None
    assert segment.topk.ids.tolist() == [[5, 6]] * 3
    np.testing.assert_allclose(np.exp(segment.topk.logprobs), [[0.5, 0.25], [0.5, 0.25], [0.6, 0.3]], rtol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "fields"),
    [
        (2, {}),
        (0, topk(0.5, 0.25)),
        (3, topk(0.5, 0.25)),
        (2, topk(0.5, 0.25, rows=3)),
        (2, topk(0.8, 0.3)),
        (2, topk(1.5, 0.1)),
        (2, topk(0.5, float("nan"))),
        (2, topk(0.5, 0.25) | {"topk_ids": np.full((2, 2), 5, np.int32)}),
        (2, topk(0.5, 0.25) | {"topk_ids": np.array([[5, -1]] * 2, np.int32)}),
        (2, topk(0.5, 0.25) | {"topk_ids": None}),
        (0, {"topk_logprobs": np.zeros((2, 0), np.float32)}),
    ],
)
def test_a_top_k_that_was_not_asked_for_or_is_none_is_refused(wanted: int, fields: dict[str, Any]) -> None:
    box = Assembler(topk=wanted)
    assert box.add(dataclasses.replace(scored(3, 0, 2, context=True), **fields)) is Verdict.MALFORMED


def test_a_version_that_goes_back_is_refused() -> None:
    box = assembler()
    held(box, 3, 2, weight_version=2)
    assert box.add(scored(3, 2, 4, weight_version=1)) is Verdict.MALFORMED
    assert box.samples[3].scored_end == 2


# --- attempts --------------------------------------------------------------------------------------------------------


def test_a_given_up_attempt_goes_on_behind_what_was_scored() -> None:
    box = assembler()
    held(box, 3, 4)
    box.add(scored(3, 6, 8))
    attempt, prefix, complete = box.give_up_attempt(3, 0)
    assert (attempt, prefix.tolist(), complete) == (1, token_ids(0, 4).tolist(), False)
    assert box.add(scored(3, 4, 6)) is Verdict.STALE_ATTEMPT
    assert box.add(scored(3, 4, 5, attempt=1, actor=2, weight_version=1, finish="stop")) is Verdict.ACCEPTED
    assert box.samples[3].actor == 2
    segment = box.take(box.samples[3])
    assert segment is not None
    assert segment.versions.tolist() == [0, 0, 0, 0, 1]


def test_giving_up_twice_keeps_the_attempt_that_followed() -> None:
    box = assembler()
    held(box, 3, 4)
    assert box.give_up_attempt(3, 0)[0] == 1
    assert box.add(scored(3, 6, 8, attempt=1)) is Verdict.EARLY
    assert box.give_up_attempt(3, 0)[0] == 1
    assert box.samples[3].early
    assert box.give_up_attempt(3, 1)[0] == 2


def test_giving_up_what_is_complete_or_trained_says_so() -> None:
    box = assembler()
    held(box, 3, 2, finish="stop")
    assert box.give_up_attempt(3, 0)[::2] == (0, True)
    box.take(box.samples[3])
    attempt, prefix, complete = box.give_up_attempt(3, 0)
    assert (attempt, len(prefix), complete) == (0, 0, True)


def test_giving_up_an_unknown_sample_bars_its_late_chunks() -> None:
    box = assembler()
    assert box.give_up_attempt(3, 0)[0] == 1
    assert box.add(scored(3, 0, 2, context=True)) is Verdict.STALE_ATTEMPT
    assert box.add(scored(3, 0, 2, attempt=1)) is Verdict.ORPHAN
    assert box.add(scored(3, 0, 2, context=True, attempt=1)) is Verdict.ACCEPTED
    assert box.samples[3].prompt.tolist() == PROMPT.tolist()


def test_restored_samples_wait_for_an_attempt_behind_their_tokens() -> None:
    box = Assembler(IntervalSet([(0, 3)]), attempt_floor=10)
    box.restore(3, token_ids(0, 4))
    box.start_at(5)
    assert box.add(scored(1, 0, 2, context=True, attempt=10)) is Verdict.DUPLICATE
    assert box.add(scored(3, 4, 5, context=True, attempt=9)) is Verdict.STALE_ATTEMPT
    assert box.add(scored(3, 0, 2, context=True, attempt=10)) is Verdict.ORPHAN
    assert box.add(scored(3, 4, 5, attempt=10)) is Verdict.ORPHAN
    assert box.add(scored(3, 4, 5, context=True, attempt=10, weight_version=5, finish="stop")) is Verdict.ACCEPTED
    segment = box.take(box.samples[3])
    assert segment is not None
    assert (segment.start, segment.end) == (4, 5)
    assert segment.token_ids.tolist() == context_to(5).tolist()


# --- marks -----------------------------------------------------------------------------------------------------------


def test_settled_waits_for_owed_tokens() -> None:
    box = assembler()
    assert box.settled(-1)
    assert not box.settled(0)
    box.mark(0, [OwedSample(3, 0, 4), OwedSample(5, 0, 0)])
    assert not box.settled(0)
    assert box.settled(-1)
    held(box, 3, 2)
    assert not box.settled(0)
    assert box.owed() == [OwedSample(3, 0, 4)]
    held(box, 3, 4)
    assert box.settled(0)
    assert not box.settled(1)
    assert box.owed() == []


def test_what_was_trained_or_given_up_is_not_owed() -> None:
    box = assembler()
    held(box, 3, 4, finish="stop")
    box.take(box.samples[3])
    held(box, 5, 2)
    box.mark(0, [OwedSample(3, 0, 4), OwedSample(5, 0, 6)])
    assert not box.settled(0)
    box.give_up_attempt(5, 0)
    assert box.settled(0)


def test_marks_settle_in_order() -> None:
    box = assembler()
    box.mark(0, [OwedSample(3, 0, 2)])
    box.mark(1, [])
    assert not box.settled(1)
    held(box, 3, 2)
    assert box.settled(1)
    assert box.settled(0)


def test_the_order_of_ends_is_kept() -> None:
    box = assembler()
    held(box, 3, 2)
    held(box, 4, 2, finish="stop")
    held(box, 3, 3, finish="stop")
    ends: list[Sample] = sorted(box.samples.values(), key=lambda sample: sample.order)
    assert [sample.sample_id for sample in ends] == [4, 3]


def test_without_a_teacher_chunks_have_no_scores_and_with_one_they_must() -> None:
    box = Assembler(teacher=False)
    assert box.add(scored(3, 0, 4, context=True)) is Verdict.MALFORMED
    assert box.add(scored(3, 0, 4, context=True, teacher_logprobs=NONE)) is Verdict.ACCEPTED
    assert box.add(scored(3, 4, 4, finish="stop", teacher_logprobs=NONE)) is Verdict.ACCEPTED
    segment = box.take(box.samples[3])
    assert segment is not None and segment.complete
    assert len(segment.teacher_logprobs) == 0 and len(segment.behaviour_logprobs) == 4
    assert Assembler().add(scored(3, 0, 4, context=True, teacher_logprobs=NONE)) is Verdict.MALFORMED


def test_the_reward_comes_with_the_end() -> None:
    box = assembler()
    held(box, 3, 2)
    assert box.add(scored(3, 2, 2, finish="stop", reward=math.nan)) is Verdict.MALFORMED
    assert box.add(scored(3, 2, 2, finish="stop", reward=0.5)) is Verdict.ACCEPTED
    assert box.samples[3].reward == 0.5
    held(box, 4, 2, finish="stop")
    assert box.samples[4].reward is None
