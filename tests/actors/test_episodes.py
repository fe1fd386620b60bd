"""Episodes in a rollout actor: turns and given tokens in chunks, ends of every kind, pauses, a second attempt."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from deadlines import patience
from fake_role import SPEED, Dispatcher, fake_role, make_plan, until, value
from faulty_engine import VOCAB, FaultyEngine, continuation
from tokenizers import Tokenizer, models, pre_tokenizers

from opd_async.actors.client.engine_client import new_connector
from opd_async.actors.rollout import episodes
from opd_async.actors.rollout.actor import RolloutActor
from opd_async.actors.rollout.session import ResponseFullError, Session
from opd_async.plan.plan import RoleKind
from opd_async.role import Role
from opd_async.transport import messages as m
from opd_async.transport.bounds import problem
from opd_async.transport.channels import Pull

PROMPT = [3, 4, 7]
LONGEST = 40
Episode = Callable[[Session, dict[str, Any]], Awaitable[float | None]]


class Running:
    """A rollout actor at work without teacher engines, and the intake that its chunks go to."""

    def __init__(self, role: Role, dispatcher: Dispatcher) -> None:
        self.role, self.dispatcher = role, dispatcher
        self.chunks: list[m.ScoredChunk] = []
        self._pull = Pull(role.context, role.plan.scored[0])

    async def collect(self) -> None:
        while True:
            chunk = await self._pull.receive()
            assert problem(chunk) is None
            self.chunks.append(chunk)

    async def lease(
        self, prefix: list[int] | None = None, kind: m.LeaseKind = m.LeaseKind.TRAIN, sample_id: int = 9
    ) -> None:
        lease = m.Lease(
            sample_id=sample_id,
            attempt=1,
            prompt_id=5,
            kind=kind.value,
            temperature=1.0,
            label="label",
            prompt=np.array(PROMPT, np.int32),
            prefix=np.array(prefix or [], np.int32),
            metadata='{"a": 1}',
        )
        await self.dispatcher.to_role.put(lease)

    async def end(self) -> m.ScoredChunk:
        """The chunk that ends the response."""
        await until(lambda: bool(self.chunks) and self.chunks[-1].finish is not None, "the end")
        return self.chunks[-1]

    def spans(self) -> list[tuple[bool, list[int]]]:
        """(sampled, tokens) of the chunks, neighbours of a kind together."""
        found: list[tuple[bool, list[int]]] = []
        for chunk in self.chunks:
            if found and found[-1][0] == chunk.sampled:
                found[-1][1].extend(chunk.token_ids.tolist())
            elif len(chunk.token_ids):
                found.append((chunk.sampled, chunk.token_ids.tolist()))
        return found

    def ended(self, end: str) -> float:
        return value(self.role, "opd_rollout_episodes_total", end=end)


@asynccontextmanager
async def rollout(
    engine: FaultyEngine,
    episode: Episode,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    deadline_s: float = 60.0 * SPEED,
    slots: int = 16,
) -> AsyncIterator[Running]:
    words = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    monkeypatch.setattr(episodes, "load_hook", lambda key, path: episode)
    plan = make_plan(
        VOCAB,
        (engine.url,),
        (),
        models={"student": {"path": str(folder)}},
        rollout={
            "chunk_tokens": 4,
            "slots": slots,
            "sampling": {"max_response_tokens": LONGEST},
            "function": "my:episode",
            "episode_deadline_s": deadline_s,
        },
        opd={"use_opd": False},
        reward={"kind": "episode"},
        evaluation={"judge": "reward", "sets": {"sums": {"path": "sums.jsonl"}}},
    )
    async with (
        aiohttp.ClientSession(connector=new_connector()) as session,
        fake_role(plan, RoleKind.ROLLOUT) as (role, dispatcher),
    ):
        actor = RolloutActor(role, session)
        running = Running(role, dispatcher)
        role.spawn(running.collect(), "collect")
        actor.start()
        await dispatcher.to_role.put(m.Resume(0))
        yield running
        actor.close()


def said(count: int, before: list[int]) -> list[int]:
    return continuation([*PROMPT, *before], count)


async def two_turns(session: Session, row: dict[str, Any]) -> float:
    assert row == {"prompt": "w3 w4 w7", "label": "label", "metadata": {"a": 1}, "kind": row["kind"]}
    first = await session.generate(max_tokens=5)
    assert first.finish == "length" and list(first.token_ids) == said(5, [])
    assert first.text == " ".join(f"w{token}" for token in first.token_ids)
    await session.give("w1 w2")
    second = await session.generate(max_tokens=3)
    assert list(second.token_ids) == said(3, [*first.token_ids, 1, 2])
    return 0.5


WHOLE = [*said(5, []), 1, 2, *said(3, [*said(5, []), 1, 2])]


async def test_turns_and_what_is_given_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FaultyEngine() as engine, rollout(engine, two_turns, tmp_path, monkeypatch) as running:
        await running.lease()
        end = await running.end()
        assert (end.finish, end.reward, end.end) == ("stop", 0.5, 10)
        assert running.spans() == [(True, WHOLE[:5]), (False, [1, 2]), (True, WHOLE[7:])]
        assert [body["input_ids"] for body in engine.seen if body.get("stream")] == [PROMPT, [*PROMPT, *WHOLE[:7]]]
        assert running.dispatcher.of(m.LeaseDone) == [m.LeaseDone(9, 1, 10, "stop", 2)]
        assert running.ended("finished") == 1


async def test_an_evaluation_runs_the_same_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FaultyEngine() as engine, rollout(engine, two_turns, tmp_path, monkeypatch) as running:
        await running.lease(kind=m.LeaseKind.EVAL_STUDENT)
        await until(lambda: bool(running.dispatcher.of(m.EvalDone)), "the evaluation")
        (done,) = running.dispatcher.of(m.EvalDone)
        assert (done.token_ids.tolist(), done.reward, done.finish) == (WHOLE, 0.5, "stop")
        assert running.chunks == [] and running.dispatcher.of(m.LeaseAway) == []


async def raises(session: Session, row: dict[str, Any]) -> None:
    await session.generate(max_tokens=4)
    await session.give("w1")
    raise ValueError("no tool today")


async def hangs(session: Session, row: dict[str, Any]) -> None:
    await session.generate(max_tokens=4)
    await asyncio.Event().wait()


async def generates_nothing(session: Session, row: dict[str, Any]) -> float:
    await session.give("w1 w2")
    return 1.0


async def never_ends(session: Session, row: dict[str, Any]) -> None:
    while True:
        await session.generate(max_tokens=7)
        await session.give("w1 w2")


async def earns_a_word(session: Session, row: dict[str, Any]) -> Any:
    await session.generate(max_tokens=4)
    return "much"


async def goes_on_behind_its_end(session: Session, row: dict[str, Any]) -> None:
    await session.generate(max_tokens=4)
    session.finish(1.0)
    await session.generate(max_tokens=4)


async def speaks_twice_at_once(session: Session, row: dict[str, Any]) -> None:
    await asyncio.gather(session.generate(max_tokens=4), session.generate(max_tokens=4))


async def gives_megabytes(session: Session, row: dict[str, Any]) -> float:
    await session.generate(max_tokens=4)
    with pytest.raises(ResponseFullError):
        await session.give("w1 " * 1_000_000)
    with pytest.raises(ResponseFullError):
        await session.give("w1 " * 36)
    assert session.room == 36
    return 1.0


async def awaits_what_was_cancelled(session: Session, row: dict[str, Any]) -> None:
    """As clients do whose connection has gone."""
    await session.generate(max_tokens=4)
    call = asyncio.create_task(asyncio.sleep(100.0))
    call.cancel()
    await call


async def ends_the_process(session: Session, row: dict[str, Any]) -> None:
    await session.generate(max_tokens=4)
    sys.exit("no such tool")


async def cancels_what_it_waits_for(session: Session, row: dict[str, Any]) -> float:
    """A cancelled task of its own that it does not wait for is nobody's business."""
    call = asyncio.create_task(asyncio.sleep(100.0))
    call.cancel()
    await session.generate(max_tokens=4)
    return 1.0


ENDS: list[tuple[Episode, str, str, int, float | None]] = [
    (raises, "raised", "failed", 5, None),
    (hangs, "deadline", "failed", 4, None),
    (generates_nothing, "empty", "stop", 2, 1.0),
    (never_ends, "full", "length", LONGEST, None),
    (earns_a_word, "raised", "failed", 4, None),
    (goes_on_behind_its_end, "raised", "failed", 4, None),
    (speaks_twice_at_once, "raised", "failed", -1, None),
    (gives_megabytes, "finished", "stop", 4, 1.0),
    (awaits_what_was_cancelled, "raised", "failed", 4, None),
    (ends_the_process, "raised", "failed", 4, None),
    (cancels_what_it_waits_for, "finished", "stop", 4, 1.0),
]


@pytest.mark.parametrize(
    ("episode", "end", "finish", "length", "reward"), ENDS, ids=lambda x: getattr(x, "__name__", "")
)
async def test_every_end_is_one_and_is_counted(
    episode: Episode,
    end: str,
    finish: str,
    length: int,
    reward: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deadline_s = (patience(0.3) if end == "deadline" else 60.0) * SPEED
    async with FaultyEngine() as engine, rollout(engine, episode, tmp_path, monkeypatch, deadline_s) as running:
        await running.lease()
        last = await running.end()
        assert (last.finish, last.reward, running.ended(end)) == (finish, reward, 1)
        assert length < 0 or last.end == length
        assert running.role.counters.get("episodes_failed", 0) == (finish == "failed")
        (done,) = running.dispatcher.of(m.LeaseDone)
        assert (done.finish, done.response_tokens) == (finish, last.end)
        assert not running.dispatcher.of(m.Failure)


async def test_an_update_may_fall_into_a_tool_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sampled is listed, what the tool answers meanwhile leaves at once, and the turn behind it waits."""
    called, answered = asyncio.Event(), asyncio.Event()

    async def episode(session: Session, row: dict[str, Any]) -> float:
        await session.generate(max_tokens=5)
        called.set()
        await answered.wait()
        await session.give("w1 w2")
        await session.generate(max_tokens=3)
        return 1.0

    async with FaultyEngine() as engine, rollout(engine, episode, tmp_path, monkeypatch) as running:
        await running.lease()
        await called.wait()
        told = running.dispatcher.of
        await until(lambda: [one.away for one in told(m.LeaseAway)] == [True], "its slot is free")
        await running.dispatcher.to_role.put(m.Pause(1))
        await until(lambda: bool(told(m.Paused)), "a pause does not wait for a tool")
        (paused,) = told(m.Paused)
        assert (paused.sample_ids.tolist(), paused.ends.tolist()) == ([9], [5])
        answered.set()
        await until(lambda: any(not chunk.sampled for chunk in running.chunks), "what the tool says")
        assert len([body for body in engine.seen if body.get("stream")]) == 1
        await running.dispatcher.to_role.put(m.Resume(0))
        await running.end()
        assert running.spans() == [(True, WHOLE[:5]), (False, [1, 2]), (True, WHOLE[7:])]
        assert [one.away for one in told(m.LeaseAway)][:2] == [True, False]


@pytest.mark.parametrize("held", range(len(WHOLE) + 1))
async def test_a_second_attempt_goes_on_behind_what_is_held(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FaultyEngine() as engine, rollout(engine, two_turns, tmp_path, monkeypatch) as running:
        await running.lease(prefix=WHOLE[:held])
        end = await running.end()
        assert (end.finish, end.reward, end.end) == ("stop", 0.5, 10)
        new = [token for _, tokens in running.spans() for token in tokens]
        assert new == WHOLE[held:] and [one for one in running.chunks if len(one.token_ids)][:1] == [
            one for one in running.chunks if one.start == held and len(one.token_ids)
        ]
        sampled = [token for kind, tokens in running.spans() if kind for token in tokens]
        assert sampled == [token for at, token in enumerate(WHOLE) if at >= held and at not in (5, 6)]
        assert running.dispatcher.of(m.LeaseDone) == [m.LeaseDone(9, 1, 10, "stop", 2)]


async def test_a_second_attempt_that_gives_something_else_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FaultyEngine() as engine, rollout(engine, two_turns, tmp_path, monkeypatch) as running:
        await running.lease(prefix=[*WHOLE[:5], 1, 9, *WHOLE[7:8]])
        end = await running.end()
        assert (end.finish, end.reward, end.end, running.ended("diverged")) == ("failed", None, 8, 1)
        assert not [body for body in engine.seen if body.get("stream")]


@pytest.mark.parametrize("held", [6, 7, 8, len(WHOLE)])
async def test_a_second_attempt_that_ends_before_what_is_held_has_diverged(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool answers otherwise the second time, and the episode is content after its first turn."""

    async def episode(session: Session, row: dict[str, Any]) -> float:
        await session.generate(max_tokens=5)
        return 1.0

    async with FaultyEngine() as engine, rollout(engine, episode, tmp_path, monkeypatch) as running:
        await running.lease(prefix=WHOLE[:held])
        end = await running.end()
        assert (end.finish, end.reward, end.end, running.ended("diverged")) == ("failed", None, held, 1)


async def test_episodes_that_block_do_not_wait_for_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a thread for each that may be under way: here more than a machine's processors would have by default."""
    slots = 16
    together = threading.Barrier(4 * slots)

    async def episode(session: Session, row: dict[str, Any]) -> float:
        await session.generate(max_tokens=5)
        await asyncio.to_thread(together.wait, patience(60.0))
        return 1.0

    async with FaultyEngine() as engine, rollout(engine, episode, tmp_path, monkeypatch, slots=slots) as running:
        for sample_id in range(4 * slots):
            await running.lease(sample_id=sample_id)
        await until(lambda: running.ended("finished") == 4 * slots, "all of them")


async def test_a_text_ends_a_turn_and_nothing_behind_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = said(30, [])
    at = next(index for index in range(3, 30) if expected[index] not in expected[:index])

    async def episode(session: Session, row: dict[str, Any]) -> float:
        turn = await session.generate(stop=f"w{expected[at - 1]} w{expected[at]}")
        assert turn.finish == "stop" and list(turn.token_ids) == expected[: at + 1]
        turn = await session.generate(max_tokens=2)
        assert list(turn.token_ids) == expected[at + 1 : at + 3]
        return 1.0

    async with FaultyEngine() as engine, rollout(engine, episode, tmp_path, monkeypatch) as running:
        await running.lease()
        end = await running.end()
        assert (end.end, end.reward, running.ended("finished")) == (at + 3, 1.0, 1)
        assert running.spans() == [(True, expected[: at + 3])]


async def test_a_turn_goes_on_after_a_broken_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FaultyEngine() as engine, rollout(engine, two_turns, tmp_path, monkeypatch) as running:
        engine.script.extend(["500", "disconnect"])
        await running.lease()
        end = await running.end()
        assert (end.end, end.reward) == (10, 0.5)
        assert running.spans() == [(True, WHOLE[:5]), (False, [1, 2]), (True, WHOLE[7:])]
