"""A response while it is generated: its chunks are its stream, cut at versions, sizes, pauses and the end."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.actors.client.engine_client import EngineClient
from opd_async.actors.client.replies import Delta
from opd_async.actors.rollout.generation import Generation, Student
from opd_async.config.topology import RolloutSection
from opd_async.errors import EngineError, EngineFault
from opd_async.scheduling.breaker import PASSING
from opd_async.transport import bounds
from opd_async.transport import messages as m

PROMPT = np.array([1, 2, 3], np.int32)
STOP_ID = 2


def generation(prefix: list[int] | None = None, version: int = 5, kind: m.LeaseKind = m.LeaseKind.TRAIN) -> Generation:
    lease = m.Lease(
        sample_id=9,
        attempt=4,
        prompt_id=6,
        kind=kind.value,
        temperature=0.7,
        label="label",
        prompt=PROMPT,
        prefix=np.array(prefix or [], np.int32),
    )
    return Generation(
        lease=lease, rid="rid", student=Student(client=cast(EngineClient, None), urls=("http://e",), version=version)
    )


def delta(*ids: int, version: int = 5, finish: m.Finish | None = None, aborted: bool = False) -> Delta:
    """Tokens whose logprobs are a tenth of their ids."""
    token_ids = np.array(ids, np.int32)
    return Delta(token_ids, (-token_ids / 10).astype(np.float32), str(version), finish, aborted)


def take(one: Generation, *deltas: Delta, stop: tuple[int, ...] = ()) -> None:
    for each in deltas:
        one.take(each, False, stop)


def shown(chunks: list[m.Chunk]) -> list[tuple[int, list[int], int, str | None]]:
    """(start, ids, version, finish)"""
    return [(one.start, one.token_ids.tolist(), one.weight_version, one.finish) for one in chunks]


def test_a_chunk_leaves_when_it_is_full() -> None:
    one = generation()
    take(one, delta(10, 11))
    assert one.due_chunks(4, actor=3) == []
    take(one, delta(12, 13, 14))
    (chunk,) = one.due_chunks(4, actor=3)
    assert shown([chunk]) == [(0, [10, 11, 12, 13, 14], 5, None)]
    np.testing.assert_allclose(chunk.behaviour_logprobs, [-1.0, -1.1, -1.2, -1.3, -1.4], rtol=1e-6)
    assert chunk.token_ids.dtype == np.int32
    assert (chunk.sample_id, chunk.attempt, chunk.actor, chunk.prompt_id, chunk.prompt_tokens) == (9, 4, 3, 6, 3)
    assert (chunk.label, chunk.context) == ("label", None)
    assert one.due_chunks(1, actor=3) == []


def test_a_pause_flushes_what_there_is() -> None:
    one = generation()
    take(one, delta(10))
    assert shown(one.due_chunks(1, 0)) == [(0, [10], 5, None)]
    assert one.due_chunks(1, 0) == []
    assert one.length == one.received == 1


def test_new_weights_begin_a_new_chunk() -> None:
    one = generation()
    take(one, delta(10, 11))
    one.student.version = 6
    take(one, delta(12, version=6), delta(13, version=6))
    assert shown(one.due_chunks(100, 0)) == [(0, [10, 11], 5, None)]
    assert shown(one.due_chunks(2, 0)) == [(2, [12, 13], 6, None)]


def test_the_end_leaves_with_the_last_tokens() -> None:
    one = generation()
    take(one, delta(10), delta(11, finish=m.Finish.LENGTH))
    assert shown(one.due_chunks(100, 0)) == [(0, [10, 11], 5, "length")]
    assert one.due_chunks(1, 0) == []


def test_an_end_that_comes_alone_leaves_as_an_empty_chunk() -> None:
    one = generation()
    take(one, delta(10))
    one.due_chunks(1, 0)
    take(one, delta(finish=m.Finish.STOP))
    assert shown(one.due_chunks(1, 0)) == [(1, [], 5, "stop")]
    assert one.due_chunks(1, 0) == []


def test_an_empty_response() -> None:
    one = generation()
    take(one, delta(finish=m.Finish.STOP))
    assert shown(one.due_chunks(8, 0)) == [(0, [], 5, "stop")]


def test_a_prefix_is_not_sent_again() -> None:
    one = generation(prefix=[20, 21])
    assert one.length == 2
    assert one.input_ids().tolist() == [1, 2, 3, 20, 21]
    take(one, delta(22))
    assert one.input_ids().tolist() == [1, 2, 3, 20, 21, 22]
    assert one.input_ids().dtype == np.int32
    assert shown(one.due_chunks(1, 0)) == [(2, [22], 5, None)]


def test_a_broken_request_goes_on_behind_what_arrived() -> None:
    one = generation()
    take(one, delta(10, 11))
    before = one.rid
    one.new_request()
    assert one.rid != before
    assert (one.received, one.length) == (0, 2)
    take(one, delta(12, finish=m.Finish.STOP))
    assert shown(one.due_chunks(100, 0)) == [(0, [10, 11, 12], 5, "stop")]


def test_an_abort_keeps_its_tokens_and_does_not_end_the_response() -> None:
    one = generation()
    one.failures.count(EngineFault.REFUSED)
    take(one, delta(10, 11, aborted=True))
    assert one.finish is None
    assert one.failures.counted == 0, "it brought tokens: that is progress"
    assert shown(one.due_chunks(1, 0)) == [(0, [10, 11], 5, None)]


@pytest.mark.parametrize("version", ["4", "6", "default", "None", "", "05"])
def test_tokens_of_other_weights_are_refused(version: str) -> None:
    one = generation()
    with pytest.raises(EngineError, match=r"weight_version: .* where the learner sent 5") as refused:
        take(one, Delta(np.array([10], np.int32), np.zeros(1, np.float32), version, None, False))
    assert refused.value.fault is EngineFault.FOREIGN and EngineFault.FOREIGN in PASSING, "the launcher mends it"
    assert (one.length, one.received, one.due_chunks(1, 0)) == (0, 0, [])


def test_the_teacher_may_have_any_weights() -> None:
    one = generation(kind=m.LeaseKind.EVAL_TEACHER)
    assert one.take(Delta(np.array([10], np.int32), np.zeros(1, np.float32), "default", None, False), True, ()) == 1


def test_a_response_whose_end_was_lost_is_recognized() -> None:
    one = generation(prefix=[20, STOP_ID])
    assert one.natural_finish(10, (STOP_ID,)) is m.Finish.STOP
    assert one.natural_finish(10, (7,)) is None
    assert one.natural_finish(2, (7,)) is m.Finish.LENGTH
    take(one, delta(21))
    assert one.natural_finish(10, (STOP_ID,)) is None
    take(one, delta())
    assert one.natural_finish(10, (21,)) is m.Finish.STOP
    assert generation().natural_finish(10, (STOP_ID,)) is None


def test_a_stop_token_at_the_length_limit_is_a_stop() -> None:
    one = generation()
    take(one, delta(10, STOP_ID, finish=m.Finish.LENGTH), stop=(STOP_ID,))
    assert shown(one.due_chunks(8, 0)) == [(0, [10, STOP_ID], 5, "stop")]


def test_a_request_asks_for_the_rest() -> None:
    one = generation(prefix=[20, 21])
    take(one, delta(22))
    section = RolloutSection.model_validate({"sampling": {"max_response_tokens": 10}, "stream_interval": 4})
    request = one.sampling(section, (STOP_ID,))
    assert (request.max_new_tokens, request.temperature, request.stream_interval) == (7, 0.7, 4)
    assert request.stop_token_ids == (STOP_ID,)


def test_an_evaluation_is_the_whole_response() -> None:
    one = generation(kind=m.LeaseKind.EVAL_STUDENT)
    take(one, delta(10), delta(11, finish=m.Finish.STOP))
    done = one.evaluation(0.5)
    assert (done.sample_id, done.finish, done.weight_version, done.token_ids.tolist()) == (9, "stop", 5, [10, 11])
    assert done.reward == 0.5


@pytest.mark.parametrize("reward", [1.5, None])
def test_tokens_do_not_wait_for_the_reward_and_the_end_does(reward: float | None) -> None:
    one = generation()
    one.awaits_reward = True
    take(one, delta(10), delta(11, finish=m.Finish.STOP))
    assert shown(one.due_chunks(8, 0)) == [(0, [10, 11], 5, None)]
    assert one.due_chunks(1, 0) == []  # a pause meanwhile announces nothing
    one.rewarded(reward)
    (end,) = one.due_chunks(1, 0)
    assert shown([end]) == [(2, [], 5, "stop")] and end.reward == reward
    assert one.due_chunks(1, 0) == []


def test_a_reward_comes_behind_an_empty_response_and_a_resumed_one_too() -> None:
    for prefix in ([], [20, STOP_ID]):
        one = generation(prefix=prefix)
        one.awaits_reward = True
        one.finish = m.Finish.STOP
        assert one.due_chunks(1, 0) == []
        one.rewarded(0.0)
        (end,) = one.due_chunks(1, 0)
        assert shown([end]) == [(len(prefix), [], 5, "stop")] and end.reward == 0.0


def test_an_evaluation_may_have_a_length_of_its_own() -> None:
    section = RolloutSection.model_validate({"sampling": {"max_response_tokens": 10}})
    one = generation()
    assert one.max_tokens(section) == 10
    one.lease = dataclasses.replace(one.lease, max_tokens=20)
    assert one.max_tokens(section) == one.sampling(section, ()).max_new_tokens == 20


EVENTS = st.lists(st.sampled_from(["tokens", "tokens", "tokens", "update", "pause", "break", "abort"]), max_size=30)


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.integers(1, 9), st.integers(0, 3), st.booleans(), st.data())
def test_chunks_are_the_stream(events: list[str], chunk_tokens: int, prefix: int, empty_end: bool, data: Any) -> None:
    """Whatever happens: in order, without gaps, of one version each, ended once, and as large as asked."""
    one = generation(prefix=list(range(prefix)))
    stream: list[tuple[int, int]] = []
    chunks: list[m.Chunk] = []
    for event in [*events, "end"]:
        version = one.student.version
        if event == "update":  # always behind a pause
            chunks += one.due_chunks(1, 0)
            assert sum(len(chunk.token_ids) for chunk in chunks) == len(stream)
            one.student.version += 1
        elif event == "pause":
            chunks += one.due_chunks(1, 0)
            assert one.due_chunks(1, 0) == []
        elif event == "break":
            one.new_request()
        else:
            count = data.draw(st.integers(0, 4)) if event != "end" else int(not empty_end)
            ids = [100 + len(stream) + i for i in range(count)]
            stream += [(token, version) for token in ids]
            finish = m.Finish.STOP if event == "end" else None
            take(one, delta(*ids, version=version, finish=finish, aborted=event == "abort"))
            new = one.due_chunks(chunk_tokens, 0)
            assert all(len(chunk.token_ids) >= chunk_tokens for chunk in new if chunk.finish is None)
            chunks += new
    assert [token for chunk in chunks for token in chunk.token_ids.tolist()] == [token for token, _ in stream]
    versions = [version for _, version in stream]
    assert [v for chunk in chunks for v in [chunk.weight_version] * len(chunk.token_ids)] == versions
    assert [chunk.start for chunk in chunks] == [prefix, *(chunk.end for chunk in chunks[:-1])]
    assert [chunk.finish for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    for chunk in chunks:
        np.testing.assert_array_equal(chunk.behaviour_logprobs, (-chunk.token_ids / 10).astype(np.float32))


def test_given_tokens_leave_in_chunks_of_their_own_and_at_once() -> None:
    one = generation()
    take(one, delta(10, 11))
    assert one.due_chunks(4, actor=3) == []
    one.give(np.array([20, 21, 22], np.int32))
    one.give(np.array([23], np.int32))
    take(one, delta(12))
    chunks = one.due_chunks(4, actor=3)
    assert [(c.start, c.token_ids.tolist(), c.sampled) for c in chunks] == [
        (0, [10, 11], True),
        (2, [20, 21, 22, 23], False),
    ]
    assert len(chunks[1].behaviour_logprobs) == 0 and chunks[1].finish is None
    assert all(bounds.problem(chunk) is None for chunk in chunks)
    assert one.input_ids().tolist() == [1, 2, 3, 10, 11, 20, 21, 22, 23, 12]
    take(one, delta(STOP_ID, finish=m.Finish.STOP))
    assert shown(one.due_chunks(4, actor=3)) == [(6, [12, STOP_ID], 5, "stop")]
    assert one.done() == m.LeaseDone(9, 4, 8, "stop", 4)


def test_given_tokens_end_no_response() -> None:
    one = generation(version=-1)
    one.give(np.array([20], np.int32))
    one.finish = m.Finish.STOP
    chunks = one.due_chunks(4, actor=3)
    assert [(c.end, c.sampled, c.finish) for c in chunks] == [(1, False, None), (1, True, "stop")]
