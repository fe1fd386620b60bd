"""Forks of a session: samples of their own, which were given what they have in common with it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from talking_engine import END
from talking_rollout import rollout

from opd_async.actors.rewards.pool import Reward, RewardPool
from opd_async.actors.rollout.session import ResponseFullError, Session
from opd_async.scheduling.further import MAX_FURTHER
from opd_async.transport import messages as m


async def test_a_fork_goes_on_from_the_same_tokens_and_trains_its_own_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        await session.generate()
        await session.give(" or ")
        fork = await session.fork()
        assert fork.text == session.text == f"one{END} or " and fork.room == session.room
        await session.generate()
        await fork.generate()
        await fork.give("!")
        deeper = await fork.fork()
        await deeper.generate()
        assert deeper.text == f"one{END} or three{END}!four{END}"
        with pytest.raises(RuntimeError, match="is under way"):
            await asyncio.gather(session.fork(), session.generate())
        return 0.5

    async with rollout(episode, tmp_path, monkeypatch, "one", "two", "three", "four") as (running, engine):
        await running.lease()
        end = await running.end()
        assert (end.finish, end.reward, running.ended("finished")) == ("stop", 0.5, 1)
        fork, deeper, _ = sorted(running.further)
        assert running.text(True) == [f"one{END}", f"two{END}"]
        assert (running.text(False, fork), running.text(True, fork)) == ([f"one{END} or ", "!"], [f"three{END}"])
        assert running.text(False, deeper) == [f"one{END} or three{END}!"]
        assert running.text(True, deeper) == [f"four{END}"]
        ends = await running.further_ends(3)
        assert [(one.reward, one.episode, one.prompt_id) for one in ends] == [(0.5, 9, 5)] * 3
        assert engine.read()[2] == engine.read()[1], "both read the same"
        prompts = {chunks[0].prompt_tokens for chunks in (running.chunks, *running.further.values())}
        assert len(prompts) == 1, "the row's prompt is the prompt of all"


async def test_a_fork_may_have_a_reward_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        for reward in (0.25, None, 0.0):
            fork = await session.fork()
            await fork.generate()
            if reward is not None:
                fork.finish(reward)
                with pytest.raises(RuntimeError, match="over"):
                    await fork.generate()
        await session.generate()
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, "a", "b", "c", "d") as (running, _):
        await running.lease()
        assert (await running.end()).reward == 1.0
        assert [end.reward for end in await running.further_ends(3)] == [0.25, 1.0, 0.0]


async def test_a_judge_reads_the_first_conversation_and_all_have_its_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        fork = await session.fork()
        await session.generate()
        await fork.generate()
        return 1.0

    async def judge(pool: RewardPool, prompt: Any, response: Any, *rest: Any) -> Reward:
        read.append(response.tolist())
        assert not [chunk for chunks in running.further.values() for chunk in chunks if chunk.finish], "not yet"
        return Reward(0.5)

    read: list[list[int]] = []
    monkeypatch.setattr(RewardPool, "reward", judge)
    monkeypatch.setattr(RewardPool, "run", lambda pool: asyncio.sleep(0))  # no processes
    async with rollout(episode, tmp_path, monkeypatch, "one", "two", reward="math") as (running, _):
        await running.lease()
        end = await running.end()
        [further] = await running.further_ends(1)
        assert (end.reward, further.reward, further.finish) == (0.5, 0.5, "stop")
        assert read == [running.tokenizer.encode(f"one{END}").ids]


async def test_what_raises_ends_forks_too_without_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        fork = await session.fork()
        await fork.generate()
        fork.finish(1.0)
        raise ValueError("no")

    async with rollout(episode, tmp_path, monkeypatch, "a") as (running, _):
        await running.lease()
        end = await running.end()
        [further] = await running.further_ends(1)
        assert (end.finish, end.reward, further.finish, further.reward) == ("failed", None, "failed", None)
        assert running.text(True) == [] and running.text(True, further.sample_id) == [f"a{END}"]
        assert running.ended("raised") == 1


async def test_an_episode_has_so_many_and_a_full_response_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        for _ in range(MAX_FURTHER):
            await session.fork()
        with pytest.raises(ResponseFullError, match="64 conversations"):
            await session.fork()
        await session.give("x" * (session.room - 1))
        await session.generate()
        with pytest.raises(ResponseFullError):
            await session.fork()
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, "a") as (running, _):
        await running.lease()
        assert (await running.end()).reward == 1.0
        assert len(running.dispatcher.of(m.FurtherWanted)) == MAX_FURTHER
        ends = await running.further_ends(MAX_FURTHER)
        assert all(end.end == 0 and end.finish == "stop" for end in ends), "nothing was said in them"


async def test_an_evaluation_forks_and_nothing_of_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        await session.generate()
        fork = await session.fork()
        assert (await fork.generate()).text == "two"
        return 1.0

    async with rollout(episode, tmp_path, monkeypatch, "one", "two") as (running, _):
        await running.lease(kind=m.LeaseKind.EVAL_STUDENT)
        done = await running.evaluated()
        assert (done.finish, done.reward) == ("stop", 1.0)
        assert not running.chunks and not running.further
        assert not running.dispatcher.of(m.FurtherWanted) and not running.dispatcher.of(m.LeaseDone)
