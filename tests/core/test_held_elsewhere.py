"""The first intake decides by what the others tell it: it must see what it would see if it held everything itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.scheduling import frontier
from opd_async.scheduling.assembly import Assembler, Sample, Verdict
from opd_async.scheduling.held_elsewhere import HeldNews, chunks_of
from opd_async.scheduling.packing import Whole, pack, whole_of
from opd_async.scheduling.step_policy import DeadlineCuts
from opd_async.transport.bounds import receive
from opd_async.transport.messages import Finish, Frontier, ScoredChunk
from opd_async.transport.to_intakes import intake_of
from opd_async.transport.wire import encode

TEACHERS = ("math", "code")
PROMPT = np.array([7, 8, 9], np.int32)


def scored(sample_id: int, start: int, tokens: int, **changes: Any) -> ScoredChunk:
    """Tokens that say where they are, and logprobs that depend on them."""
    ids = np.arange(start, start + tokens, dtype=np.int32) + 1000 * (sample_id % 1000)
    logprobs = -(ids % 4).astype(np.float32)
    made = ScoredChunk(
        sample_id=sample_id,
        attempt=0,
        actor=1,
        prompt_id=sample_id // 2,
        prompt_tokens=len(PROMPT),
        start=start,
        weight_version=0,
        finish=None,
        label="",
        teacher_id="teacher-0",
        latency_s=0.1,
        token_ids=ids,
        behaviour_logprobs=logprobs,
        teacher_logprobs=logprobs / 2,
        context=PROMPT if start == 0 else None,
        teacher=TEACHERS[sample_id % 2],
    )
    return dataclasses.replace(made, **changes)


class Intakes:
    """The first intake and another, with a third that holds everything, as the one intake of a run would."""

    def __init__(self, state: Frontier | None = None) -> None:
        state = state or frontier.empty(0)
        self.first, self.alone = frontier.restore(state), frontier.restore(state)
        self.other = frontier.restore(frontier.share(state, lambda sample_id: intake_of(sample_id, 2) == 1))
        self.news = HeldNews(TEACHERS)
        self.other.on_held = self.news.held

    def arrive(self, chunk: ScoredChunk) -> None:
        verdict = self.alone.add(chunk)
        mine = self.first if intake_of(chunk.sample_id, 2) == 0 else self.other
        assert mine.add(chunk) is verdict

    def tell(self) -> None:
        message = receive(encode(self.news.message()))
        assert len(self.news) == 0
        for chunk in chunks_of(message, TEACHERS, scored=True):
            assert self.first.put(chunk) is Verdict.ACCEPTED


def outline(sample: Sample) -> tuple[Any, ...]:
    """What a step is decided by, and its figures are made of."""
    prompts = [None if ids is None else len(ids) for ids in (sample.teacher_prompt, sample.contrast_prompt)]
    return (
        *(sample.sample_id, sample.attempt, sample.actor, sample.prompt_id, len(sample.prompt), prompts),
        *(sample.trained_end, sample.scored_end, sample.given, sample.untrained_given, sample.finish, sample.reward),
        *(sample.turns, sample.teacher, sample.version, sample.episode, sample.further),
        [(piece.version, len(piece.token_ids), piece.sampled) for piece in sample.untrained],
        [len(piece.teacher_logprobs) for piece in sample.untrained],
    )


def test_the_first_sees_the_same_samples_and_the_same_sums() -> None:
    intakes = Intakes()
    prompt = np.arange(5, dtype=np.int32)
    intakes.arrive(scored(1, 0, 6, teacher_prompt=prompt, contrast_prompt=prompt[:2]))
    intakes.arrive(
        scored(
            *(1, 6, 4),
            sampled=False,
            behaviour_logprobs=np.zeros(0, np.float32),
            teacher_logprobs=np.zeros(0, np.float32),
        )
    )
    turns = {"turn_ends": np.array([6], np.int32), "turn_rewards": np.array([0.25], np.float32)}
    further = np.array([2**52 + 1], np.int64)
    intakes.arrive(scored(1, 10, 5, weight_version=2, finish=Finish.LENGTH, reward=1 / 3, further=further, **turns))
    intakes.arrive(scored(2**52 + 1, 0, 3, episode=1, finish=Finish.STOP))
    intakes.arrive(scored(2, 0, 9))
    intakes.tell()
    assert [outline(one) for one in intakes.first.samples.values() if one.sample_id != 2] == [
        outline(one) for one in intakes.alone.samples.values() if one.sample_id != 2
    ]
    assert intakes.first.samples[1].reward == 1 / 3
    known, whole = (one.take(one.samples[1]) for one in (intakes.first, intakes.alone))
    assert known is not None and whole is not None
    assert (known.tokens, known.longest, known.sampled_runs()) == (whole.tokens, whole.longest, whole.sampled_runs())
    np.testing.assert_array_equal(known.versions, whole.versions)
    counted = [segment.behaviour_logprobs != 0.0 for segment in (known, whole)]
    assert counted[0].sum() == counted[1].sum()
    for field in ("behaviour_logprobs", "teacher_logprobs"):
        sums = [getattr(segment, field)[at].sum() for segment, at in zip((known, whole), counted, strict=True)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-6)


def test_an_attempt_that_is_given_up_goes_on_behind_what_is_held() -> None:
    intakes = Intakes()
    intakes.arrive(scored(3, 0, 4))
    intakes.tell()
    intakes.arrive(scored(3, 4, 4))  # held, and not told yet
    intakes.tell()  # before the answer to Reclaim
    held = [one.give_up_attempt(3, 0) for one in (intakes.other, intakes.first, intakes.alone)]
    assert [(one.attempt, len(one.tokens), one.complete) for one in held] == [(1, 8, False)] * 3
    np.testing.assert_array_equal(held[0].tokens, held[2].tokens)
    intakes.arrive(scored(3, 8, 2))  # of the old attempt, under way: refused on both sides
    context = np.concatenate([PROMPT, held[0].tokens])
    intakes.arrive(scored(3, 8, 3, attempt=1, actor=0, context=context, finish=Finish.STOP))
    intakes.tell()
    assert outline(intakes.first.samples[3]) == outline(intakes.alone.samples[3])


CHUNKS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.booleans()), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(CHUNKS, st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2]))
def test_every_token_is_trained_once_in_order_as_by_one_intake(
    rows: list[tuple[int, int, bool]], seed: int, bound: int
) -> None:
    """Chunks arrive in any order, news late; steps are taken by the first intake's view."""
    chance = np.random.default_rng(seed)
    intakes, policy = Intakes(), DeadlineCuts(12, bound)
    ends, over, trained, version = dict.fromkeys(range(6), 0), set(), dict.fromkeys(range(6), 0), 0
    for sample_id, tokens, finishes in rows:
        if sample_id in over:
            continue
        finish = Finish.STOP if finishes else None
        chunk = scored(sample_id, ends[sample_id], tokens, weight_version=version, finish=finish)
        intakes.arrive(chunk)
        intakes.arrive(chunk)  # a second time: a duplicate on either side
        ends[sample_id] += tokens
        over |= {sample_id} if finishes else set()
        if chance.random() < 0.5:
            continue
        intakes.tell()
        for sample in policy.choose(intakes.first, version):
            version_of_oldest = sample.oldest_version if sample.untrained_tokens else version
            assert version - version_of_oldest <= bound
            _take(intakes, sample, trained)
        version += 1
        _no_older_than(intakes, version, bound, trained)
    intakes.tell()
    for sample in list(intakes.first.samples.values()):
        _take(intakes, sample, trained)
    assert trained == ends


def _take(intakes: Intakes, sample: Sample, trained: dict[int, int]) -> None:
    """Take a sample by the first intake's view, and check the tokens that whoever holds it gives to the learner."""
    sample_id, end, complete = sample.sample_id, sample.scored_end, sample.finish is not None
    known = intakes.first.take(sample)
    if intake_of(sample_id, 2):
        known = intakes.other.take_to(intakes.other.samples[sample_id], end, complete=complete)
    whole = intakes.alone.take_to(intakes.alone.samples[sample_id], end, complete=complete)
    if whole is None:
        assert known is None
        return
    assert known is not None and (known.start, known.end) == (trained[sample_id], end)
    np.testing.assert_array_equal(known.token_ids, whole.token_ids)
    np.testing.assert_array_equal(known.behaviour_logprobs, whole.behaviour_logprobs)
    trained[sample_id] = end


def _no_older_than(intakes: Intakes, version: int, bound: int, trained: dict[int, int]) -> None:
    """What would be too old now is trained, however few tokens a step has."""
    for sample in list(intakes.first.samples.values()):
        if sample.untrained_tokens and sample.oldest_version <= version - bound:
            _take(intakes, sample, trained)


def test_a_checkpoint_has_the_tokens_of_both_and_is_resumed_by_any_number() -> None:
    intakes = Intakes()
    for sample_id in range(4):
        intakes.arrive(scored(sample_id, 0, 5))
    intakes.arrive(scored(0, 5, 2, finish=Finish.STOP))
    intakes.tell()
    trained = dict.fromkeys(range(4), 0)
    for sample in list(intakes.first.samples.values()):
        _take(intakes, sample, trained)
    intakes.arrive(scored(1, 5, 3))  # behind what is trained: forgotten with the run
    elsewhere = {1: scored(1, 0, 5).token_ids, 3: scored(3, 0, 5).token_ids}
    assert frontier.snapshot(intakes.other, 1).partial_ids.tolist() == list(elsewhere)
    found = frontier.joined(frontier.snapshot(intakes.first, 1), elsewhere, lambda sample_id: sample_id % 2 == 0)
    whole = frontier.snapshot(intakes.alone, 1)
    for field in dataclasses.fields(Frontier):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(whole, field.name), err_msg=field.name)
    again = Intakes(found)
    assert [len(one.samples) for one in (again.first, again.other)] == [3, 2]
    context = np.concatenate([PROMPT, again.other.samples[3].response()])
    again.arrive(scored(3, 5, 2, context=context))
    again.tell()
    assert outline(again.first.samples[3]) == outline(again.alone.samples[3])


def test_intakes_that_do_not_agree_are_an_error() -> None:
    intakes = Intakes()
    intakes.arrive(scored(1, 0, 5))
    intakes.tell()
    intakes.first.take(intakes.first.samples[1])
    known = frontier.snapshot(intakes.first, 1)
    tokens = scored(1, 0, 5).token_ids
    for elsewhere in ({}, {1: tokens[:4]}):
        with pytest.raises(ValueError, match="sample 1 is trained up to 5"):
            frontier.joined(known, elsewhere, lambda sample_id: sample_id % 2 == 0)
    with pytest.raises(ValueError, match="sample 1 is partly trained by the word of its intake alone"):
        frontier.joined(frontier.empty(1), {1: tokens}, lambda sample_id: sample_id % 2 == 0)


def test_a_share_is_packed_for_its_ranks_and_says_what_the_whole_has() -> None:
    holder = Assembler()
    for sample_id in range(6):
        holder.add(scored(sample_id, 0, 4 + 3 * sample_id, finish=Finish.STOP))
    segments = [segment for sample in list(holder.samples.values()) if (segment := holder.take(sample)) is not None]
    shares = [segments[:5], segments[5:]]
    whole = whole_of(shares, 1, 25)
    assert whole.loss_tokens == sum(segment.tokens for segment in segments)
    assert whole.micro_batches == len(pack(shares[0], 0, 1, 25)[0].micro_batches) > 1
    batches = [pack(share, 0, 1, 25, whole=whole)[0] for share in shares]
    assert {(batch.loss_tokens, len(batch.micro_batches)) for batch in batches} == {
        (whole.loss_tokens, whole.micro_batches)
    }
    rows = [sum(len(one.rows) for one in batch.micro_batches) for batch in batches]
    assert rows == [sum(segment.tokens for segment in share) for share in shares]
    assert pack([], 0, 1, 25, whole=Whole(9, 2))[0].loss_tokens == 9
