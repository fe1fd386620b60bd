"""A rollout actor whose engine fails in every way still delivers each response, token for token."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import pytest
import zmq.asyncio
from deadlines import patience
from fake_role import SPEED, Dispatcher, fake_role, make_plan, until, value
from faulty_engine import FAULTS, VOCAB, FaultyEngine, continuation, distribution, scores_of

from opd_async.actors.client.engine_client import new_connector
from opd_async.actors.rollout.actor import RolloutActor
from opd_async.plan.plan import Plan, RoleKind
from opd_async.role import Role
from opd_async.transport import messages as m
from opd_async.transport.channels import Pull

TOKENS = 12
SAMPLES = 6
NOBODY = "http://127.0.0.1:1"
"""An address where connections are refused."""


def lease(sample_id: int) -> m.Lease:
    prompt = np.array([sample_id, sample_id + 1, 7], np.int32)
    return m.Lease(
        sample_id=sample_id,
        attempt=0,
        prompt_id=sample_id,
        kind=m.LeaseKind.TRAIN.value,
        temperature=1.0,
        label="",
        prompt=prompt,
        prefix=np.zeros(0, np.int32),
        teacher="teacher",
    )


class Running:
    """A rollout actor at work, and the teacher that its chunks go to."""

    def __init__(self, role: Role, dispatcher: Dispatcher, plan: Plan, context: zmq.asyncio.Context) -> None:
        self.role, self.dispatcher = role, dispatcher
        self.responses: dict[int, list[int]] = {}
        self.certain = True
        """Every token had probability 1, in chunks of at most four."""
        self._chunks = Pull(context, plan.chunks[0])

    async def collect(self) -> None:
        while True:
            chunk = await self._chunks.receive()
            response = self.responses.setdefault(chunk.sample_id, [])
            assert chunk.start == len(response)
            response += chunk.token_ids.tolist()
            self.certain &= not chunk.behaviour_logprobs.any() and len(chunk.token_ids) <= 4

    def complete(self) -> bool:
        ended = len(self.dispatcher.of(m.LeaseDone)) == SAMPLES
        return ended and sum(map(len, self.responses.values())) == SAMPLES * TOKENS


@asynccontextmanager
async def rollout(
    engine: FaultyEngine,
    samples: int = SAMPLES,
    deadline_s: float = 60.0 * SPEED,
    teachers: tuple[str, ...] = (NOBODY,),
    judge: str = "answer",
    silence_s: float = 0.15,
    others: tuple[str, ...] = (),
    kind: str = "external",
    topk: int = 0,
) -> AsyncIterator[Running]:
    """`deadline_s`: how long an engine may be out; `silence_s`: how long it may be silent."""
    sums: dict[str, Any] = {"path": "sums.jsonl", "judge": judge, "teacher_topk": topk}
    sections = {
        "rollout": {
            "request_deadline_s": patience(silence_s),
            "chunk_tokens": 4,
            "sampling": {"max_response_tokens": TOKENS},
        },
        "supervisor": {"start_deadline_s": deadline_s},
        "evaluation": {"sets": {"sums": sums, "words": {"path": "words.jsonl"}}},
        "engines": {"student": {"kind": kind}, "teacher": {"kind": "external"}},
    }
    plan = make_plan(VOCAB, (engine.url, *others), teachers, **sections)
    async with (
        aiohttp.ClientSession(connector=new_connector()) as session,
        fake_role(plan, RoleKind.ROLLOUT) as (role, dispatcher),
    ):
        actor = RolloutActor(role, session)
        running = Running(role, dispatcher, plan, role.context)
        role.spawn(running.collect(), "collect")
        role.spawn(actor.control(), "control")
        await dispatcher.to_role.put(m.Resume(0))
        for sample_id in range(samples):
            await dispatcher.to_role.put(lease(sample_id))
        yield running
        actor.close()


def check(running: Running, samples: int = SAMPLES) -> None:
    expected = {n: continuation([n, n + 1, 7], TOKENS) for n in range(samples)}
    assert running.responses == expected
    assert running.dispatcher.of(m.Failure) == []


async def test_a_given_response_is_delivered_without_an_engine() -> None:
    """In chunks, from behind the prefix of an earlier attempt, each token certain; nothing is asked of the engine."""
    response = np.arange(10, 20, dtype=np.int32)
    async with FaultyEngine() as engine, rollout(engine, samples=0) as running:
        for sample_id, done in ((0, 0), (1, 3)):
            prefix = response[:done]
            given = dataclasses.replace(lease(sample_id), given=response, prefix=prefix, attempt=int(done > 0))
            running.responses[sample_id] = prefix.tolist()
            await running.dispatcher.to_role.put(given)
        await until(lambda: len(running.dispatcher.of(m.LeaseDone)) == 2, "both leases")
        await until(lambda: running.responses == {0: response.tolist(), 1: response.tolist()}, "both responses")
        assert {done.response_tokens for done in running.dispatcher.of(m.LeaseDone)} == {10}
        assert running.certain and not [body for body in engine.seen if body.get("stream")]
        assert "tokens" not in running.role.counters  # nothing was generated


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_now_and_then(fault: str) -> None:
    async with FaultyEngine() as engine:
        engine.script.extend([fault, "disconnect", fault])
        async with rollout(engine) as running:
            await until(running.complete, "all responses")
            check(running)
            assert running.role.counters["engine_errors"] == 3


@pytest.mark.parametrize("fault", ["429", "503", "hang"])
async def test_a_bad_time_passes(fault: str) -> None:
    """Every request fails until the breaker has opened; then the engine recovers."""
    async with FaultyEngine() as engine:
        engine.fault = fault
        async with rollout(engine) as running:
            gauge = "opd_rollout_breaker_open"
            await until(lambda: value(running.role, gauge, engine=engine.url) == 1, "the breaker to open")
            asked = len(engine.seen)
            await asyncio.sleep(0.3)
            assert len(engine.seen) - asked <= 30, "an open breaker lets single probes through"
            engine.fault = None
            await until(running.complete, "all responses")
            check(running)
            assert value(running.role, gauge, engine=engine.url) == 0


async def test_a_restart() -> None:
    """Connections are refused for a while, longer than a request would be tried."""
    async with FaultyEngine() as engine:
        engine.fault = "hang"
        async with rollout(engine) as running:
            await until(lambda: len(engine.seen) >= SAMPLES, "requests")
            await engine.stop()
            engine.fault = None
            await until(lambda: running.role.counters.get("engine_errors", 0) >= SAMPLES + 6, "refused connections")
            await engine.start()
            await until(running.complete, "all responses")
            check(running)


async def test_the_responses_of_a_slow_engine_go_on_elsewhere() -> None:
    """Open requests are sent to another engine behind the tokens that arrived; once it is tried again it has work."""
    async with (
        FaultyEngine() as slow,
        FaultyEngine() as peer,
        rollout(slow, silence_s=600.0, others=(peer.url,)) as running,
    ):
        slow.stalls = True
        await until(lambda: len(running.dispatcher.of(m.LeaseDone)) == SAMPLES // 2, "the peer's responses")
        await until(lambda: len(slow.seen) == SAMPLES // 2, "the slow engine's requests")
        await until(lambda: running.role.counters["tokens"] == SAMPLES // 2 * (TOKENS + 2), "the slow engine's tokens")
        await running.dispatcher.to_role.put(m.EngineSlow(slow.url, True))
        await until(running.complete, "all responses")
        check(running)
        moved = [body["input_ids"] for body in peer.seen if len(body["input_ids"]) > 3]
        assert sorted(ids[0] for ids in moved) == [0, 2, 4] and all(len(ids) == 5 for ids in moved)
        assert "engine_errors" not in running.role.counters
        slow.stalls = False
        await running.dispatcher.to_role.put(m.EngineSlow(slow.url, False))
        await running.dispatcher.to_role.put(lease(8))
        await until(lambda: len(slow.seen) == SAMPLES // 2 + 1, "work for the engine that was slow")


@pytest.mark.parametrize("given", [False, True])
async def test_the_work_of_an_engine_that_does_not_come_back_goes_to_its_peer(given: bool) -> None:
    """Its host is lost: its responses wait at a closed gate until the launcher gives it up. Updates go on without it,
    and it has work again when it is back."""
    response = np.arange(TOKENS, dtype=np.int32) if given else None

    def one(sample_id: int) -> m.Lease:
        return dataclasses.replace(lease(sample_id), given=response)

    async with FaultyEngine() as gone, FaultyEngine() as peer, rollout(gone, 0, others=(peer.url,)) as running:
        tell, told = running.dispatcher.to_role.put, running.dispatcher.of
        await tell(m.EngineDown(gone.url))
        for sample_id in range(SAMPLES):
            await tell(one(sample_id))
        await until(lambda: len(told(m.LeaseDone)) == SAMPLES // 2, "the peer's responses")
        await tell(m.EngineSlow(gone.url, True))
        await until(running.complete, "all responses")
        resumed = gone.resumed
        await tell(m.Pause(7))
        await until(lambda: bool(told(m.Paused)), "the list of tokens")
        await tell(m.Resume(0))
        await tell(one(2 * SAMPLES))
        await until(lambda: len(told(m.LeaseDone)) == SAMPLES + 1, "one more response")
        assert gone.seen == [] and gone.resumed == resumed, "nobody speaks to it"
        await tell(m.EngineSlow(gone.url, False))
        await tell(m.Pause(8))
        await tell(m.Resume(0))
        await tell(lease(2 * SAMPLES + 2))
        await until(lambda: len(gone.seen) == 1, "work for the engine that is back")
        assert gone.resumed == resumed + 1 and told(m.Failure) == []


@pytest.mark.parametrize("kind", ["embedded", "external"])
async def test_an_engine_that_does_not_stop_holds_up_no_pause(kind: str) -> None:
    """Its streams are closed: no token comes after the list, and what it kept to itself is generated again."""
    async with FaultyEngine() as engine, rollout(engine, silence_s=600.0, kind=kind) as running:
        engine.stalls = True
        await until(lambda: running.role.counters.get("tokens") == 2 * SAMPLES, "the first event of every stream")
        await running.dispatcher.to_role.put(m.Pause(7))
        await until(lambda: bool(running.dispatcher.of(m.Paused)), "the list of tokens")
        (paused,) = running.dispatcher.of(m.Paused)
        assert paused.request == 7 and paused.sample_ids.tolist() == list(range(SAMPLES))
        assert paused.ends.tolist() == [2] * SAMPLES
        engine.stalls = False
        engine.release()
        await asyncio.sleep(0.1)
        assert running.role.counters["tokens"] == 2 * SAMPLES, "none comes after the list"
        await running.dispatcher.to_role.put(m.Resume(0))
        await until(running.complete, "all responses")
        check(running)


async def test_an_engine_that_was_thought_to_be_gone_sends_nothing_behind_the_list() -> None:
    """Its network was cut for a moment: it cannot be stopped, and its streams go on once the list is made."""
    async with FaultyEngine() as engine, rollout(engine, silence_s=600.0) as running:
        engine.stalls = True
        await until(lambda: running.role.counters.get("tokens") == 2 * SAMPLES, "the first event of every stream")
        await running.dispatcher.to_role.put(m.EngineDown(engine.url))
        await running.dispatcher.to_role.put(m.Pause(7))
        await until(lambda: bool(running.dispatcher.of(m.Paused)), "the list of tokens")
        (paused,) = running.dispatcher.of(m.Paused)
        assert paused.ends.tolist() == [2] * SAMPLES
        engine.stalls = False
        engine.release()
        await until(lambda: running.role.counters.get("engine_errors") == SAMPLES, "the end of every stream")
        assert running.role.counters["tokens"] == 2 * SAMPLES
        await running.dispatcher.to_role.put(m.Resume(0))
        await until(running.complete, "all responses")
        check(running)


@pytest.mark.parametrize(("fault", "tries"), [("400", 3), ("500", 6)])
async def test_what_never_works_ends_the_run(fault: str, tries: int) -> None:
    async with FaultyEngine() as engine:
        engine.fault = fault
        async with rollout(engine, samples=1) as running:
            await until(lambda: bool(running.dispatcher.of(m.Failure)), "the failure")
            (failure,) = running.dispatcher.of(m.Failure)
            assert f"injected {fault}" in failure.text and engine.url in failure.text
            assert len(engine.seen) == tries


async def test_an_outage_that_does_not_end() -> None:
    async with FaultyEngine() as engine:
        engine.fault = "503"
        async with rollout(engine, deadline_s=0.5 * SPEED) as running:
            await until(lambda: bool(running.dispatcher.of(m.Failure)), "the failure")
            assert "fails again and again, last: " in running.dispatcher.of(m.Failure)[0].text
            assert running.role.counters["engine_errors"] > SAMPLES, "it was waited out for a while"


async def test_an_evaluation_leaves_out_a_teacher_engine_that_is_gone() -> None:
    async with (
        FaultyEngine() as student,
        FaultyEngine() as teacher,
        rollout(student, samples=0, teachers=(NOBODY, teacher.url)) as running,
    ):
        for sample_id in range(SAMPLES):
            kind = m.LeaseKind.EVAL_TEACHER.value
            await running.dispatcher.to_role.put(dataclasses.replace(lease(sample_id), kind=kind))
        await until(lambda: len(running.dispatcher.of(m.EvalDone)) == SAMPLES, "all evaluation responses")
        for done in running.dispatcher.of(m.EvalDone):
            n = done.sample_id
            assert done.token_ids.tolist() == continuation([n, n + 1, 7], TOKENS)
        assert student.seen == []


async def test_a_teacher_judges_what_the_student_sampled() -> None:
    """It reads a prompt of its own where it has one, and is asked again after a failure; about responses that were
    sampled for a set that it judges, and no others."""
    async with (
        FaultyEngine() as student,
        FaultyEngine() as teacher,
        rollout(student, samples=0, teachers=(teacher.url,), judge="teacher") as running,
    ):
        teacher.script.append("500")
        kind, own = m.LeaseKind.EVAL_STUDENT.value, np.array([8, 9], np.int32)
        first = dataclasses.replace(lease(0), kind=kind, evaluation_set="sums")
        second = dataclasses.replace(first, sample_id=1, prompt=lease(1).prompt, teacher_prompt=own)
        greedy = dataclasses.replace(first, sample_id=2, prompt=lease(2).prompt, temperature=0.0)
        other = dataclasses.replace(first, sample_id=3, prompt=lease(3).prompt, evaluation_set="words")
        for one in (first, second, greedy, other):
            await running.dispatcher.to_role.put(one)
        await until(lambda: len(running.dispatcher.of(m.EvalDone)) == 4, "all evaluation responses")
        done = {one.sample_id: one for one in running.dispatcher.of(m.EvalDone)}
        responses = {n: continuation([n, n + 1, 7], TOKENS) for n in done}
        assert {n: one.token_ids.tolist() for n, one in done.items()} == responses
        for n, prompt in ((0, [0, 1, 7]), (1, [8, 9])):
            expected = scores_of([*prompt, *responses[n]], len(prompt))
            np.testing.assert_allclose(np.asarray(done[n].teacher_logprobs), expected, rtol=1e-6)
            assert len(np.asarray(done[n].student_logprobs)) == TOKENS
        assert done[2].teacher_logprobs is None and done[3].teacher_logprobs is None


@pytest.mark.parametrize("k", [8, 100])
async def test_both_sides_are_asked_for_their_likeliest_tokens(k: int) -> None:
    """With the vocabulary or more both divergences are exact; the student's engine uses keys of its weights alone."""
    async with (
        FaultyEngine() as student,
        FaultyEngine(shift=0.5) as teacher,
        rollout(student, samples=0, teachers=(teacher.url,), judge="teacher", topk=k) as running,
    ):
        student.script += ["", "503"]  # nothing to the stream, a failure to the first request for its tokens
        own = np.array([8, 9], np.int32)
        one = dataclasses.replace(lease(0), kind=m.LeaseKind.EVAL_STUDENT.value, evaluation_set="sums")
        await running.dispatcher.to_role.put(dataclasses.replace(one, teacher_prompt=own))
        await until(lambda: bool(running.dispatcher.of(m.EvalDone)), "the response")
        (done,) = running.dispatcher.of(m.EvalDone)
        befores = [7, *done.token_ids.tolist()[:-1]]
        p = np.array([distribution(before) for before in befores])
        q = np.array([distribution(before, 0.5) for before in [9, *befores[1:]]])
        reverse, forward = (np.exp(p) * (p - q)).sum(1), (np.exp(q) * (q - p)).sum(1)
        found = np.asarray(done.reverse_kl), np.asarray(done.forward_kl)
        if k >= VOCAB:
            np.testing.assert_allclose(found[0], reverse, atol=1e-5)
            np.testing.assert_allclose(found[1], forward, atol=1e-5)
        assert (found[0] <= reverse + 1e-5).all() and (found[1] <= forward + 1e-5).all()
        assert found[0].mean() > 0.0 and found[1].mean() > 0.0
        asked = [body for body in student.seen if not body.get("stream")]
        assert [body["extra_key"] for body in asked] == ["0", "0"] and len(teacher.seen) == 1
        assert {body["top_logprobs_num"] for body in (*asked, *teacher.seen)} == {min(k, VOCAB)}
        np.testing.assert_allclose(
            np.asarray(done.teacher_logprobs), q[np.arange(TOKENS), done.token_ids], rtol=1e-5, atol=1e-6
        )


async def test_a_response_of_other_weights_is_left_unscored() -> None:
    """The weights have changed behind its last token: the student's distributions are others."""
    async with (
        FaultyEngine() as student,
        FaultyEngine() as teacher,
        rollout(student, samples=0, teachers=(teacher.url,), judge="teacher", topk=8, silence_s=60.0) as running,
    ):
        teacher.script.append("hang")
        one = dataclasses.replace(lease(0), kind=m.LeaseKind.EVAL_STUDENT.value, evaluation_set="sums")
        await running.dispatcher.to_role.put(one)
        await until(lambda: bool(teacher.seen), "the end of the response")
        await running.dispatcher.to_role.put(m.Pause(1))
        await until(lambda: bool(running.dispatcher.of(m.Paused)), "the pause")
        teacher.release()
        await running.dispatcher.to_role.put(m.Resume(1))
        await until(lambda: bool(running.dispatcher.of(m.EvalDone)), "the response")
        (done,) = running.dispatcher.of(m.EvalDone)
        assert (done.reverse_kl, done.teacher_logprobs, done.student_logprobs) == (None, None, None)
        assert len(done.token_ids) == TOKENS


async def test_a_teacher_that_cannot_be_asked_leaves_a_response_unscored() -> None:
    async with (
        FaultyEngine() as student,
        FaultyEngine() as teacher,
        rollout(student, samples=0, teachers=(teacher.url,), judge="teacher") as running,
    ):
        teacher.fault = "400"
        kind = m.LeaseKind.EVAL_STUDENT.value
        await running.dispatcher.to_role.put(dataclasses.replace(lease(0), kind=kind, evaluation_set="sums"))
        await until(lambda: bool(running.dispatcher.of(m.EvalDone)), "the response")
        (done,) = running.dispatcher.of(m.EvalDone)
        assert (done.teacher_logprobs, done.student_logprobs) == (None, None)
        assert len(done.token_ids) == TOKENS
