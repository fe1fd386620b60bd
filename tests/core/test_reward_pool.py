"""Judging in processes of their own: deadlines, deaths and mistakes are failures with a name, never rewards of zero."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from deadlines import patience
from small_runs import small_topology

from opd_async.actors.rewards import pool as reward_pool
from opd_async.actors.rewards.pool import Reward, RewardPool
from opd_async.errors import RoleError
from opd_async.plan.resolve import make_plan

USER_MODULE = """
import asyncio, os, time

async def judge(prompt, response, label, metadata):
    print("what a user prints must not disturb the line")
    if label == "slow":
        await asyncio.sleep(3600)
    if label == "blocks":
        time.sleep(3600)
    if label == "dies":
        os._exit(3)
    if label == "raises":
        raise ValueError("no such answer")
    if label == "nan":
        return float("nan")
    if label == "waits":
        await asyncio.sleep(0.3)
    return metadata["points"] + len(response) + (prompt == "ab")
"""
IDS = {letter: index for index, letter in enumerate("abcdefghij", 3)}


def ids(text: str) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array([IDS[letter] for letter in text], np.int32)


Judge = Callable[[str], Awaitable[Reward]]


def with_pool(root: Path, work: Callable[[Judge], Awaitable[None]], *overrides: str) -> None:
    """Run `work` with a function that judges the response "abc" under a label."""
    (root / "user_rewards.py").write_text(USER_MODULE)
    own = ("reward.kind=python", "reward.function=user_rewards:judge", f"reward.timeout_s={patience(0.5)}")
    chosen = overrides or own
    plan = make_plan(small_topology(root, *chosen))
    file = root / "plan.json"
    file.write_text(plan.model_dump_json())

    async def main() -> None:
        pool = RewardPool(plan.topology.reward, file)
        async with asyncio.timeout(patience(60)), asyncio.TaskGroup() as group:
            task = group.create_task(pool.run())
            await work(lambda label: pool.reward(ids("ab"), ids("abc"), label, '{"points": 0.5}', True))
            task.cancel()

    asyncio.run(main())


@pytest.fixture(autouse=True)
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_users_function_judges_and_its_failures_have_names(tmp_path: Path) -> None:
    async def work(judge: Judge) -> None:
        assert await judge("fine") == Reward(4.5)
        slow, raises, nan, fine = await asyncio.gather(*(judge(label) for label in ("slow", "raises", "nan", "fine")))
        assert (slow, raises, nan, fine) == (
            Reward(None, "timeout"),
            Reward(None, "error"),
            Reward(None, "error"),
            Reward(4.5),
        )

    with_pool(tmp_path, work)


def test_a_worker_that_blocks_or_dies_is_replaced_and_its_other_requests_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_pool, "GRACE_S", 0.5)

    async def work(judge: Judge) -> None:
        first = asyncio.create_task(judge("waits"))
        await asyncio.sleep(0.01)  # so that the innocent one is with the worker when it hangs
        blocks, waits = await asyncio.gather(judge("blocks"), first)
        assert blocks == Reward(None, "timeout")
        assert waits in (Reward(4.5), Reward(None, "timeout"))  # it was killed before or after its own deadline
        assert await judge("dies") == Reward(None, "worker_died")
        assert await judge("fine") == Reward(4.5)

    with_pool(tmp_path, work)


def test_a_rule_that_cannot_be_loaded_ends_the_actor(tmp_path: Path) -> None:
    async def work(judge: Judge) -> None:
        await judge("fine")

    with pytest.raises(ExceptionGroup) as error:
        with_pool(tmp_path, work, "reward.kind=python", "reward.function=user_rewards:nothing")
    assert error.group_contains(RoleError, match="3 reward workers in a row ended before they were ready")


def test_rules_judge_in_a_worker_too(tmp_path: Path) -> None:
    async def work(judge: Judge) -> None:
        assert await judge("b") == Reward(1.0)
        assert await judge("c") == Reward(0.0)

    with_pool(tmp_path, work, "reward.kind=exact_match", "evaluation.answer_pattern='^a(.)c$'")
