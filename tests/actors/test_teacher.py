"""A teacher actor over two engines: one prefix cache per prompt, and every token scored whatever an engine does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import numpy as np
import pytest
from deadlines import patience
from fake_role import SPEED, Dispatcher, fake_role, make_plan, until, value
from faulty_engine import FAULTS, VOCAB, FaultyEngine, continuation, scores_of

from opd_async.actors.client.engine_client import new_connector
from opd_async.actors.teacher.actor import TeacherActor
from opd_async.errors import RoleError
from opd_async.plan.plan import RoleKind
from opd_async.role import Role
from opd_async.scheduling.cache_share import SENTINEL_EVERY
from opd_async.transport import messages as m
from opd_async.transport.channels import Pull, Push

CHUNK = 4


def prompt_of(prompt_id: int) -> list[int]:
    return [prompt_id % VOCAB, (3 * prompt_id + 1) % VOCAB, *range(10)]


class Teacher:
    """A teacher actor at work, with the rollout actor before it and the intake behind it."""

    def __init__(self, role: Role, dispatcher: Dispatcher) -> None:
        self.role, self.dispatcher = role, dispatcher
        self._push = Push(role.context, role.plan.chunks[0])
        self._pull = Pull(role.context, role.plan.scored[0])
        self.scores: dict[tuple[int, int], list[float]] = {}
        self.contrasts: dict[tuple[int, int], list[float] | None] = {}
        self.sent: dict[tuple[int, int], list[float]] = {}
        self.versions: dict[tuple[int, int], int | None] = {}

    async def collect(self) -> None:
        while True:
            chunk = await self._pull.receive()
            self.scores.setdefault((chunk.sample_id, chunk.start), chunk.teacher_logprobs.tolist())
            self.versions.setdefault((chunk.sample_id, chunk.start), chunk.scored_version)
            contrast = chunk.contrast_logprobs
            self.contrasts[chunk.sample_id, chunk.start] = None if contrast is None else contrast.tolist()

    async def send(
        self, sample_id: int, chunks: int, *, first: int = 0, end: bool = True, version: int = 0, known: bool = False
    ) -> None:
        """Chunks `first` to `first + chunks` of a sample, whose prompt has its number; `known`: the actor has its
        beginning."""
        prompt = prompt_of(sample_id)
        tokens = continuation(prompt, (first + chunks) * CHUNK)
        for index in range(first, first + chunks):
            start = index * CHUNK
            part = np.array(tokens[start : start + CHUNK], np.int32)
            before = np.array([*prompt, *tokens[:start]], np.int32)
            self.sent[sample_id, start] = scores_of([*before.tolist(), *part.tolist()], len(before)).tolist()
            finish = "stop" if end and index == first + chunks - 1 else None
            context = before if index == first and not known else None
            await self._push.send(
                m.Chunk(
                    sample_id=sample_id,
                    attempt=0,
                    actor=0,
                    prompt_id=sample_id,
                    prompt_tokens=len(prompt),
                    start=start,
                    weight_version=version,
                    finish=finish,
                    label="",
                    made_at=0.0,
                    token_ids=part,
                    behaviour_logprobs=np.full(CHUNK, -1.0, np.float32),
                    context=context,
                    teacher="teacher",
                )
            )

    async def push(self, chunk: m.Chunk) -> None:
        await self._push.send(chunk)

    async def all_scored(self) -> None:
        await until(lambda: len(self.scores) == len(self.sent), "all scores")
        assert self.scores == self.sent
        assert self.dispatcher.of(m.Failure) == []

    def failed(self) -> bool:
        return bool(self.dispatcher.of(m.Failure))

    def open(self, engine: FaultyEngine) -> bool:
        return value(self.role, "opd_teacher_breaker_open", engine=engine.url) == 1

    def retries(self, kind: str) -> float:
        return value(self.role, "opd_teacher_retries_total", kind=kind)


@asynccontextmanager
async def teacher(
    *engines: FaultyEngine,
    deadline_s: float = 60.0 * SPEED,
    opd: dict[str, object] | None = None,
    schedule: dict[str, object] | None = None,
    **settings: object,
) -> AsyncIterator[Teacher]:
    section = {"request_deadline_s": patience(0.3), "batch_tokens": 2 * CHUNK, "max_wait_ms": 5.0} | settings
    sections = {"teacher": section, "rollout": {"chunk_tokens": CHUNK}, "supervisor": {"start_deadline_s": deadline_s}}
    sections |= {name: given for name, given in (("opd", opd), ("schedule", schedule)) if given is not None}
    plan = make_plan(VOCAB, ("http://127.0.0.1:1",), tuple(engine.url for engine in engines), **sections)
    async with (
        aiohttp.ClientSession(connector=new_connector()) as session,
        fake_role(plan, RoleKind.TEACHER) as (role, dispatcher),
    ):
        actor = TeacherActor(role, session)
        running = Teacher(role, dispatcher)
        await actor.prepare()
        role.spawn(actor.control(), "control")
        role.spawn(running.collect(), "collect")
        actor.start()
        yield running
        actor.close()


def samples_of(engine: FaultyEngine) -> set[tuple[int, ...]]:
    """The prompts that an engine has scored."""
    return {tuple(ids[:12]) for ids in engine.scored}


@pytest.mark.parametrize("other", [[], [7, 3, 5]])
async def test_a_prompt_of_the_teachers_own_stands_in_front_of_the_same_response(other: list[int]) -> None:
    """Whole and in pieces, also where the actor has to be told the beginning again. Behind the prompt of a contrast the
    same tokens are scored by the same request, which is repeated whole when it fails."""
    prompt, own = prompt_of(5), list(range(31))
    tokens = continuation(prompt, 3 * CHUNK)
    async with FaultyEngine() as engine, teacher(engine) as running:
        engine.script.append("500")
        for start, again in ((0, True), (CHUNK, False), (2 * CHUNK, True)):
            part = np.array(tokens[start : start + CHUNK], np.int32)
            running.sent[5, start] = scores_of([*own, *tokens[: start + CHUNK]], len(own) + start).tolist()
            sent = m.Chunk(
                sample_id=5,
                attempt=0,
                actor=0,
                prompt_id=5,
                prompt_tokens=len(prompt),
                start=start,
                weight_version=0,
                finish="stop" if start == 2 * CHUNK else None,
                label="",
                made_at=0.0,
                token_ids=part,
                behaviour_logprobs=np.full(CHUNK, -1.0, np.float32),
                context=np.array([*prompt, *tokens[:start]], np.int32) if again else None,
                teacher="teacher",
                teacher_prompt_tokens=len(own),
                teacher_prompt=np.array(own, np.int32) if again else None,
                contrast_prompt_tokens=len(other),
                contrast_prompt=np.array(other, np.int32) if again and other else None,
            )
            await running.push(sent)
            await running.all_scored()
            beside = scores_of([*other, *tokens[: start + CHUNK]], len(other) + start).tolist() if other else None
            assert running.contrasts[5, start] == beside
        assert [ids[: len(own)] for ids in engine.scored if len(ids) > len(own)] == [own] * 4, "one try failed"
        assert value(running.role, "opd_teacher_scored_tokens_total") == 3 * CHUNK


def span(sample_id: int, tokens: list[int], start: int, count: int, *, sampled: bool, finish: bool = False) -> m.Chunk:
    """A part of an episode; its beginning brings the prompt."""
    prompt = prompt_of(sample_id)
    return m.Chunk(
        sample_id=sample_id,
        attempt=0,
        actor=0,
        prompt_id=sample_id,
        prompt_tokens=len(prompt),
        start=start,
        weight_version=0,
        finish="stop" if finish else None,
        label="",
        made_at=0.0,
        token_ids=np.array(tokens[start : start + count], np.int32),
        behaviour_logprobs=np.full(count if sampled else 0, -1.0, np.float32),
        context=np.array(prompt, np.int32) if start == 0 else None,
        teacher="teacher",
        sampled=sampled,
    )


async def test_given_tokens_are_context_of_what_is_scored_and_cost_no_request() -> None:
    prompt = prompt_of(5)
    tokens = continuation(prompt, 30)
    async with FaultyEngine() as engine, teacher(engine) as running:
        canaries = len(engine.scored)
        await running.push(span(5, tokens, 0, 5, sampled=True))
        running.sent[5, 0] = scores_of([*prompt, *tokens[:5]], len(prompt)).tolist()
        await running.all_scored()
        for start, count in ((5, 7), (12, 3)):
            await running.push(span(5, tokens, start, count, sampled=False))
            running.sent[5, start] = []
        await running.all_scored()
        assert len(engine.scored) == canaries + 1, "they are on their way to the intake, and no engine was asked"
        await running.push(span(5, tokens, 15, 4, sampled=True, finish=True))
        running.sent[5, 15] = scores_of([*prompt, *tokens[:19]], len(prompt) + 15).tolist()
        await running.all_scored()
        assert engine.scored[-1] == [*prompt, *tokens[:19]]
        assert value(running.role, "opd_teacher_scored_tokens_total") == 9


async def test_given_tokens_do_not_overtake_what_is_still_to_be_scored() -> None:
    """The intake knows a sample by its beginning: what comes before that would be of an unknown one, and dropped."""
    async with FaultyEngine() as engine, teacher(engine) as running:
        for sample_id in range(8):
            prompt, tokens = prompt_of(sample_id), continuation(prompt_of(sample_id), 30)
            for start, count, sampled in ((0, 5, True), (5, 7, False), (12, 3, False), (15, 4, True), (19, 2, False)):
                await running.push(span(sample_id, tokens, start, count, sampled=sampled))
                whole = [*prompt, *tokens[: start + count]]
                running.sent[sample_id, start] = scores_of(whole, len(prompt) + start).tolist() if sampled else []
            await running.push(span(sample_id, tokens, 21, 0, sampled=True, finish=True))
            running.sent[sample_id, 21] = []
        await running.all_scored()
        for sample_id in range(8):
            assert [start for sample, start in running.scores if sample == sample_id] == [0, 5, 12, 15, 19, 21]


async def test_given_tokens_are_no_sign_of_a_cache_that_does_not_hold() -> None:
    """No engine has seen them before: that they are computed says nothing of what it has forgotten."""
    async with FaultyEngine() as engine, teacher(engine) as running:
        engine.remembers = True
        for sample_id in range(16):
            tokens = continuation(prompt_of(sample_id), 300)
            await running.push(span(sample_id, tokens, 0, 4, sampled=True))
            await running.push(span(sample_id, tokens, 4, 200, sampled=False))
            running.sent[sample_id, 0] = scores_of(
                [*prompt_of(sample_id), *tokens[:4]], len(prompt_of(sample_id))
            ).tolist()
            running.sent[sample_id, 4] = []
            await running.all_scored()
            await running.push(span(sample_id, tokens, 204, 4, sampled=True, finish=True))
            whole = [*prompt_of(sample_id), *tokens[:208]]
            running.sent[sample_id, 204] = scores_of(whole, len(whole) - 4).tolist()
            await running.all_scored()
        assert value(running.role, "opd_teacher_prefix_share", engine=engine.url) > 0.95


async def test_all_of_a_prompt_meets_one_engine() -> None:
    async with FaultyEngine() as one, FaultyEngine() as two, teacher(one, two) as running:
        for sample_id in range(12):
            await running.send(sample_id, 3, end=False)
        await running.all_scored()
        for sample_id in range(12):
            await running.send(sample_id, 2, first=3)
        await running.all_scored()
        assert len(samples_of(one)) + len(samples_of(two)) == 12
        assert len(samples_of(one)) == 6 and not samples_of(one) & samples_of(two)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "400"])
async def test_a_fault_now_and_then(fault: str) -> None:
    async with FaultyEngine() as engine, teacher(engine) as running:
        engine.script.extend([fault, fault])
        for sample_id in range(4):
            await running.send(sample_id, 3)
        await running.all_scored()
        kinds = {"error": "failed", "500": "failed", "disconnect": "disconnected", "hang": "silent"}
        # after a hang a canary is next, and may take the second fault
        assert running.retries(kinds.get(fault, "busy")) >= (1 if fault == "hang" else 2)


@pytest.mark.parametrize("fault", ["503", "500", "hang", "refused"])
async def test_work_moves_to_another_engine_and_comes_back(fault: str) -> None:
    async with FaultyEngine() as one, FaultyEngine() as two, teacher(one, two) as running:
        if fault == "refused":
            await one.stop()
        else:
            one.fault = fault
        for sample_id in range(12):
            await running.send(sample_id, 3, end=False)
        await running.all_scored()
        assert len(samples_of(two)) == 12 and running.open(one) and not running.open(two)
        one.fault = None
        if fault == "refused":
            await one.start()
        await until(lambda: not running.open(one), "the canary to pass")
        one.seen.clear()
        for sample_id in range(12):
            await running.send(sample_id, 1, first=3)
            await running.send(12 + sample_id, 1)
        await running.all_scored()
        begun = {tuple(prompt_of(sample_id)) for sample_id in range(12, 24)}
        assert samples_of(one) and samples_of(one) <= begun, "what was moved stays, where its keys and values are now"
        assert value(running.role, "opd_teacher_rerouted_chunks_total") > 0


async def test_the_work_of_a_slow_engine_goes_elsewhere() -> None:
    """What waits and what is being scored; the actor says how long answers take; and the engine gets work again."""
    async with (
        FaultyEngine() as one,
        FaultyEngine() as two,
        teacher(one, two, request_deadline_s=600.0) as running,
    ):
        one.stalls = True
        for sample_id in range(12):
            await running.send(sample_id, 3, end=False)
        await until(lambda: bool(one.scored), "a batch at the slow engine")
        told = running.dispatcher.of
        await until(lambda: any(pace.url == one.url and pace.wait_s > 1 for pace in told(m.EnginePace)), "its pace")
        await running.dispatcher.to_role.put(m.EngineSlow(one.url, True))
        await running.all_scored()
        assert len(samples_of(two)) == 12
        one.stalls = False
        one.seen.clear()
        await running.dispatcher.to_role.put(m.EngineSlow(one.url, False))
        for sample_id in range(12):
            await running.send(sample_id, 1, first=3)
            await running.send(12 + sample_id, 1)
        await running.all_scored()
        begun = {tuple(prompt_of(sample_id)) for sample_id in range(12, 24)}
        assert samples_of(one) and samples_of(one) <= begun, "what was moved stays, where its keys and values are now"


async def test_no_engine_for_a_while() -> None:
    async with FaultyEngine() as one, FaultyEngine() as two, teacher(one, two) as running:
        one.fault = two.fault = "503"
        for sample_id in range(8):
            await running.send(sample_id, 2)
        await until(lambda: running.open(one) and running.open(two), "both breakers to open")
        two.fault = None
        await running.all_scored()
        assert len(samples_of(two)) == 8


async def test_no_engine_for_too_long() -> None:
    async with FaultyEngine() as engine, teacher(engine, deadline_s=0.5 * SPEED) as running:
        engine.fault = "503"
        await running.send(0, 1)
        await until(running.failed, "the end of the run")
        assert f"{engine.url} has not scored anything for" in running.dispatcher.of(m.Failure)[0].text


@pytest.mark.parametrize(("fault", "tries"), [("400", 3), ("500", 11)])
async def test_what_never_works_ends_the_run(fault: str, tries: int) -> None:
    """Other requests are fine: only the sample can be to blame."""
    async with FaultyEngine() as engine, teacher(engine) as running:
        engine.poison, engine.poison_fault = prompt_of(1), fault
        await running.send(1, 1)
        await until(running.failed, "the end of the run")
        text = running.dispatcher.of(m.Failure)[0].text
        assert text.startswith(f"samples 1, ... cannot be scored, {tries} tries") and f"injected {fault}" in text


async def test_a_teacher_that_changes_is_not_used() -> None:
    async with (
        FaultyEngine() as one,
        FaultyEngine() as two,
        teacher(one, two, canary_every_s=0.05 * SPEED) as running,
    ):
        one.shift = 0.2
        await until(lambda: running.open(one), "the canary to find it")
        for sample_id in range(8):
            await running.send(sample_id, 2)
        await until(lambda: len(running.scores) == len(running.sent), "all scores")
        assert running.scores == running.sent, "nothing is scored by the engine that changed"
        await until(running.failed, "the end of the run")
        text = running.dispatcher.of(m.Failure)[0].text
        assert text.startswith(f"{one.url}: scores of a test text have changed by 0.2 nats")
        assert value(running.role, "opd_teacher_canaries_total", result="insane") >= 3
        assert value(running.role, "opd_teacher_canaries_total", result="passed") >= 1


class Replaced(FaultyEngine):
    """An engine whose weights are replaced when it has scored so many texts."""

    texts = 20

    def _scores(self, ids: list[int], start: int) -> object:
        self.texts -= len(ids) > 12  # canaries are shorter
        if self.texts < 0:
            self.shift = 0.2
        return super()._scores(ids, start)


async def test_wrong_weights_score_no_more_than_so_many_tokens_and_those_are_named() -> None:
    """Canaries come by tokens, long before their time; what was scored since the last good one is said."""
    limit = 10 * CHUNK
    async with (
        Replaced() as one,
        FaultyEngine() as two,
        teacher(one, two, canary_every_s=1e6, canary_every_tokens=limit) as running,
    ):
        for sample_id in range(80):
            await running.send(sample_id, 4)
        await until(lambda: len(running.scores) == len(running.sent), "all scores")
        await until(lambda: bool(running.dispatcher.of(m.SuspectScores)), "what is suspect")
        passed = value(running.role, "opd_teacher_canaries_total", result="passed")
        assert one.texts < 0 and passed >= 4, "several canaries before the weights were replaced"
        wrong = {key for key, scores in running.scores.items() if scores != running.sent[key]}
        found = running.dispatcher.of(m.SuspectScores)
        rows = [row for one in found for row in zip(one.sample_ids, one.starts, one.ends, strict=True)]
        named = {(int(sample), at) for sample, start, end in rows for at in range(start, end, CHUNK)}
        assert wrong <= named and 0 < len(named) * CHUNK <= limit + 4 * CHUNK  # all of a sample may be one batch
        assert {message.url for message in found} == {one.url} and "have changed by 0.2 nats" in found[0].text


async def test_a_teacher_that_names_other_weights_is_suspect_at_once() -> None:
    async with FaultyEngine() as engine, teacher(engine, canary_every_s=1e6) as running:
        await running.send(1, 3)
        await running.all_scored()
        await running.dispatcher.to_role.put(m.EngineChanged(engine.url, "another version"))
        await until(lambda: bool(running.dispatcher.of(m.SuspectScores)), "what is suspect")
        (found,) = running.dispatcher.of(m.SuspectScores)
        assert int((found.ends - found.starts).sum()) == 3 * CHUNK and set(found.sample_ids) == {1}
        assert (found.url, found.text) == (engine.url, "another version")


async def test_replicas_that_differ_are_refused_at_start() -> None:
    async def run() -> None:
        async with FaultyEngine() as one, FaultyEngine(shift=0.2) as two, teacher(one, two):
            raise AssertionError("started")

    with pytest.raises(ExceptionGroup) as caught:
        await run()
    assert caught.group_contains(RoleError, match="replicas of one teacher must hold the same model")


async def test_without_a_cache_tokens_wait_for_ends_and_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_async.scheduling.cache_share._BELIEF", 1.0)
    async with FaultyEngine(cached=False) as engine, teacher(engine, max_wait_ms=0.0) as running:
        for index in range(2):  # the second chunk shows that nothing of the first was kept
            await running.send(0, 1, first=index, end=False)
            await running.all_scored()
        engine.seen.clear()
        share = "opd_teacher_prefix_share"
        await until(lambda: value(running.role, share, engine=engine.url) < 0.5, "a verdict on the cache")
        await running.send(2, 8)
        await until(lambda: len(running.scores) == 2 + 8, "the end of a response")
        assert len(engine.scored) == 1
        await running.send(SENTINEL_EVERY, 3, end=False)
        await until(lambda: len(running.scores) == 2 + 8 + 2, "the cut points of a sentinel at 4 and 8")
        await running.send(3, 3, end=False)
        await running.dispatcher.to_role.put(m.Resume(1))
        await running.all_scored()


async def test_a_reset_forgets() -> None:
    async with FaultyEngine() as engine, teacher(engine) as running:
        engine.fault = "hang"
        await running.send(0, 3)
        await until(lambda: bool(engine.scored), "a batch under way")
        await running.dispatcher.to_role.put(m.Reset(5))
        await until(lambda: bool(running.dispatcher.of(m.ResetDone)), "its answer")
        engine.fault = None
        running.sent.clear()
        await running.send(7, 3)
        await running.all_scored()


LIVE = {"use_opd": True, "type": "self", "self": {"place": "engines", "weights": "live"}, "loss": "reverse_kl"}


def salts(engine: FaultyEngine) -> list[str]:
    """Whose keys and values the requests for scores could use; canaries are shorter."""
    return [body["extra_key"] for body in engine.seen if len(body["input_ids"]) > 12]


@pytest.mark.parametrize("pause_mode", ["in_place", "retract"])
async def test_live_weights_score_between_updates_alone(pause_mode: str) -> None:
    """Nothing is asked before the run has said what the engines hold, nor while they are sent weights; in place a
    response goes on with the keys and values that it has. What is ended for new weights is asked again: no failure."""
    schedule = {"steps": 1, "pause_mode": pause_mode}
    async with FaultyEngine() as engine, teacher(engine, opd=LIVE, schedule=schedule) as running:
        await running.send(1, 1, end=False, version=3)
        await until(lambda: value(running.role, "opd_teacher_queue_tokens") >= 0, "the gauge")
        assert running.scores == {} and engine.seen == []
        for number, version in enumerate((3, 4)):
            engine.weights = str(version)
            await running.dispatcher.to_role.put(m.Resume(version))
            await running.all_scored()
            await running.dispatcher.to_role.put(m.Pause(number))
            await until(lambda: len(running.dispatcher.of(m.Paused)) > number, "an answer")  # noqa: B023
            seen = len(engine.seen)
            await running.send(1, 1, first=number + 1, end=False, version=version, known=True)
            await running.send(2 + number, 1, version=version)
            await asyncio.sleep(0.1)
            assert len(engine.seen) == seen
        await running.dispatcher.to_role.put(m.Resume(4))
        await running.all_scored()
        assert running.versions[1, 0] == 3 and running.versions[1, CHUNK] == running.versions[3, 0] == 4
        first = [body["extra_key"] for body in engine.seen if body["input_ids"][:3] == prompt_of(1)[:3]]
        assert len(first) == 3 and len(set(first)) == (1 if pause_mode == "in_place" else 2)

        assert running.retries("aborted") == 0
        engine.script += ["abort"] * 8  # more than open a breaker
        await running.send(4, 1, version=4)
        await running.all_scored()
        assert running.retries("aborted") == 8 and not running.open(engine)


async def test_an_end_without_tokens_waits_with_tokens_for_live_scores() -> None:
    """The reward came later than the tokens: nothing of that chunk was scored by any weights."""
    prompt, tokens = prompt_of(1), continuation(prompt_of(1), CHUNK)
    facts = {
        "sample_id": 1,
        "attempt": 0,
        "actor": 0,
        "prompt_id": 1,
        "prompt_tokens": len(prompt),
        "weight_version": 3,
    }
    nothing = {"token_ids": np.zeros(0, np.int32), "behaviour_logprobs": np.zeros(0, np.float32)}
    end = m.Chunk(**facts, **nothing, start=CHUNK, finish="stop", label="", made_at=0.0, teacher="teacher", reward=1.0)
    async with FaultyEngine() as engine, teacher(engine, opd=LIVE) as running:
        engine.weights = "3"
        await running.send(1, 1, end=False, version=3)
        running.sent[1, CHUNK] = []
        await running.push(end)
        await until(lambda: value(running.role, "opd_teacher_queue_tokens") == len(tokens), "the chunks to wait")
        await running.dispatcher.to_role.put(m.Resume(3))
        await running.all_scored()
        assert running.versions == {(1, 0): 3, (1, CHUNK): None}


async def test_no_probe_is_sent_while_weights_are_on_their_way() -> None:
    """An engine that fails is asked whether it works again, but not in the middle of an update; after it at once."""
    async with FaultyEngine() as engine, teacher(engine, opd=LIVE) as running:
        engine.weights = "3"
        await running.send(1, 1, version=3)
        for request in range(1, 5):  # a probe is not always due when an update begins
            engine.fault, before = "503", len(engine.seen)
            await running.dispatcher.to_role.put(m.Resume(3))
            await until(lambda: len(engine.seen) > before and running.open(engine), "the breaker to open")  # noqa: B023
            await running.dispatcher.to_role.put(m.Pause(request))
            await until(lambda: len(running.dispatcher.of(m.Paused)) == request, "an answer")  # noqa: B023
            engine.fault, seen = None, len(engine.seen)
            await asyncio.sleep(20.0 / SPEED)
            assert len(engine.seen) == seen and running.open(engine)
        await running.dispatcher.to_role.put(m.Resume(3))
        await running.all_scored()


async def test_an_engine_that_holds_other_weights_scores_nothing() -> None:
    """One that was started again, until it is sent the run's; what it has cached by then is not used."""
    async with FaultyEngine() as engine:
        engine.weights = "default"
        async with teacher(engine, opd=LIVE) as running:
            await running.dispatcher.to_role.put(m.Resume(3))
            await running.send(2, 1, version=3)
            await until(lambda: running.open(engine), "the breaker to open")
            assert running.scores == {}
            engine.weights = "3"
            before = set(salts(engine))
            await running.all_scored()
            assert running.versions[2, 0] == 3
            assert salts(engine)[-1] not in before


async def test_tokens_of_a_history_that_is_over_are_not_trained_with_live_scores() -> None:
    """The run has gone back to a checkpoint. Its later weights have caches of their own, whatever their numbers are."""
    async with FaultyEngine() as engine:
        engine.weights = "7"
        async with teacher(engine, opd=LIVE) as running:
            await running.dispatcher.to_role.put(m.Resume(7))
            await running.send(1, 1, end=False, version=7)
            await running.all_scored()
            await running.dispatcher.to_role.put(m.Reset(5))
            await until(lambda: running.dispatcher.of(m.ResetDone) != [], "the reset")
            engine.weights = "3"
            await running.dispatcher.to_role.put(m.Resume(3))
            await running.send(2, 1, version=7)
            await until(lambda: value(running.role, "opd_teacher_orphan_chunks_total") == 1, "the old chunk to go")
            del running.sent[2, 0]
            for version in (3, 7):
                engine.weights = str(version)
                await running.dispatcher.to_role.put(m.Resume(version))
                await running.send(3 + version, 1, version=version)
                await running.all_scored()
            assert salts(engine)[0] not in salts(engine)[1:] and len(set(salts(engine))) == 3


async def test_a_canary_of_live_weights_finds_no_keys_and_values_of_an_earlier_process() -> None:
    """The actor may be started again, and the engine still has what its predecessor left there."""
    async with FaultyEngine() as engine:
        engine.weights = "3"
        for _ in range(2):
            async with teacher(engine, opd=LIVE, canary_every_s=0.5) as running:
                await running.dispatcher.to_role.put(m.Resume(3))
                await until(lambda: value(running.role, "opd_teacher_canaries_total", result="passed") >= 2, "canaries")
        keys = [body["extra_key"] for body in engine.seen]
        assert len(set(keys)) >= 4 and all(keys.count(key) == 3 for key in set(keys[:-3]))
