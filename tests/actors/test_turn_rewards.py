"""What single turns of an episode have earned: told by the episode, and kept with the reward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from talking_rollout import rollout

from opd_async.actors.rollout.session import Session


async def test_turns_are_told_what_they_have_earned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> float:
        with pytest.raises(RuntimeError, match="no turn yet"):
            session.reward(1.0)
        await session.generate()
        session.reward(0.25)
        await session.give("and")
        session.reward(0.5)  # of the same turn: the student has said nothing since
        fork = await session.fork()
        with pytest.raises(RuntimeError, match="no turn yet"):
            fork.reward(1.0)
        await fork.generate()
        fork.reward(-1.0)
        await session.generate()
        await session.generate()
        session.reward(2.0)
        for bad in (math.nan, "much", None):
            with pytest.raises(ValueError, match="a reward of"):
                session.reward(bad)  # type: ignore[arg-type]
        session.finish(4.0)
        with pytest.raises(RuntimeError, match="over"):
            session.reward(1.0)
        return 8.0

    async with rollout(episode, tmp_path, monkeypatch, "one", "two", "three", "four") as (running, _):
        await running.lease()
        end = await running.end()
        turns = [len(word) + 1 for word in ("one", "three", "four")]
        assert end.turn_ends is not None and end.turn_rewards is not None
        assert end.turn_ends.tolist() == [turns[0], sum(turns) + len("and")]
        assert end.turn_rewards.tolist() == [0.75, 2.0] and end.reward == 10.75
        assert all(chunk.turn_ends is None for chunk in running.chunks[:-1])
        [fork] = await running.further_ends(1)
        assert fork.turn_ends is not None and fork.turn_ends.tolist() == [fork.end] and fork.reward == 7.0


async def test_rewards_of_turns_are_enough_and_an_episode_that_fails_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def episode(session: Session, row: dict[str, Any]) -> None:
        await session.generate()
        session.reward(0.5)
        if session.text.startswith("bad"):
            raise ValueError("no")

    for said, reward in (("good", 0.5), ("bad", None)):
        async with rollout(episode, tmp_path, monkeypatch, said) as (running, _):
            await running.lease()
            end = await running.end()
            assert end.reward == reward and (end.turn_ends is None) == (reward is None)
