"""A rollout actor whose responses are judged: tokens first, then the end with the reward."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import numpy as np
import pytest
from fake_role import Dispatcher, fake_role, make_plan, until, value
from faulty_engine import VOCAB, FaultyEngine, continuation

from opd_async.actors.client.engine_client import new_connector
from opd_async.actors.rewards.pool import Reward, RewardPool
from opd_async.actors.rollout.actor import RolloutActor
from opd_async.plan.plan import RoleKind
from opd_async.role import Role
from opd_async.transport import messages as m
from opd_async.transport.channels import Pull

TOKENS = 12
PROMPT = [3, 4, 7]


class Bench:
    """What judges instead of a process, when it is let."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.verdict = Reward(0.5)
        self.asked: list[tuple[list[int], list[int], str, str, bool]] = []

    async def reward(self, pool: RewardPool, prompt: Any, response: Any, *rest: Any) -> Reward:
        self.asked.append((prompt.tolist(), response.tolist(), *rest))
        await self.open.wait()
        return self.verdict


class Running:
    """A rollout actor at work without teacher engines, and the intake that its chunks go to."""

    def __init__(self, role: Role, dispatcher: Dispatcher, bench: Bench, pull: Pull) -> None:
        self.role, self.dispatcher, self.bench = role, dispatcher, bench
        self.chunks: list[m.ScoredChunk] = []
        self._pull = pull

    async def collect(self) -> None:
        while True:
            self.chunks.append(await self._pull.receive())

    async def lease(self, kind: m.LeaseKind = m.LeaseKind.TRAIN, prefix: int = 0) -> None:
        tokens = np.array(continuation(PROMPT, TOKENS)[:prefix], np.int32)
        prompt = np.array(PROMPT, np.int32)
        lease = m.Lease(
            sample_id=9,
            attempt=1,
            prompt_id=5,
            kind=kind.value,
            temperature=1.0,
            label="label",
            prompt=prompt,
            prefix=tokens,
            metadata='{"a": 1}',
            evaluation_set="" if kind is m.LeaseKind.TRAIN else "sums",
        )
        await self.dispatcher.to_role.put(lease)

    def tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)


@asynccontextmanager
async def rollout(
    engine: FaultyEngine, monkeypatch: pytest.MonkeyPatch, judge: str = "reward"
) -> AsyncIterator[Running]:
    bench = Bench()
    monkeypatch.setattr(RewardPool, "reward", lambda pool, *request: bench.reward(pool, *request))
    plan = make_plan(
        VOCAB,
        (engine.url,),
        (),
        rollout={"chunk_tokens": 4, "sampling": {"max_response_tokens": TOKENS}},
        opd={"use_opd": False},
        reward={"kind": "math"},
        evaluation={"judge": "answer", "sets": {"sums": {"path": "sums.jsonl", "judge": judge}}},
    )
    async with (
        aiohttp.ClientSession(connector=new_connector()) as session,
        fake_role(plan, RoleKind.ROLLOUT) as (role, dispatcher),
    ):
        actor = RolloutActor(role, session)
        running = Running(role, dispatcher, bench, Pull(role.context, plan.scored[0]))
        role.spawn(running.collect(), "collect")
        role.spawn(actor.control(), "control")
        await dispatcher.to_role.put(m.Resume(0))
        yield running
        actor.close()


@pytest.mark.parametrize("verdict", [Reward(0.5), Reward(None, "timeout")])
async def test_the_end_comes_behind_the_tokens_with_the_reward(
    verdict: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FaultyEngine() as engine, rollout(engine, monkeypatch) as running:
        running.bench.verdict = verdict
        await running.lease()
        await until(lambda: running.tokens() == TOKENS and bool(running.bench.asked), "all tokens, unjudged")
        said = running.dispatcher
        assert [done.response_tokens for done in said.of(m.LeaseDone)] == [TOKENS], "its slot is free already"
        await said.to_role.put(m.Pause(1))
        await until(lambda: bool(said.of(m.Paused)), "a pause does not wait for a judge")
        (paused,) = said.of(m.Paused)
        assert (paused.sample_ids.tolist(), paused.ends.tolist()) == ([9], [TOKENS])
        assert all(chunk.finish is None and chunk.reward is None for chunk in running.chunks)
        running.bench.open.set()
        await until(lambda: running.chunks[-1].finish is not None, "the end")
        end = running.chunks[-1]
        assert (end.start, len(end.token_ids), end.finish, end.reward) == (TOKENS, 0, "length", verdict.value)
        request = (PROMPT, continuation(PROMPT, TOKENS), "label", '{"a": 1}', False)
        assert running.bench.asked == [request]
        failed = value(running.role, "opd_rollout_reward_failures_total", kind="timeout")
        assert failed == running.role.counters.get("reward_failures", 0.0) == (verdict.value is None)


async def test_a_response_that_lost_its_actor_before_it_was_judged_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its tokens are held already: the next attempt generates nothing and brings the end."""
    async with FaultyEngine() as engine, rollout(engine, monkeypatch) as running:
        running.bench.open.set()
        await running.lease(prefix=TOKENS)
        await until(lambda: bool(running.chunks), "the end")
        (end,) = running.chunks
        assert (end.start, len(end.token_ids), end.finish, end.reward) == (TOKENS, 0, "length", 0.5)
        assert end.context is not None and end.context.tolist() == PROMPT + continuation(PROMPT, TOKENS)
        assert not engine.seen or all("stream" not in body for body in engine.seen)


@pytest.mark.parametrize(("judge", "reward"), [("reward", 0.5), ("answer", None)])
async def test_evaluations_are_judged_where_they_ask_for_it(
    judge: str, reward: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FaultyEngine() as engine, rollout(engine, monkeypatch, judge) as running:
        running.bench.open.set()
        await running.lease(m.LeaseKind.EVAL_STUDENT)
        await until(lambda: bool(running.dispatcher.of(m.EvalDone)), "the evaluation")
        (done,) = running.dispatcher.of(m.EvalDone)
        assert done.reward == reward and len(done.token_ids) == TOKENS
        assert len(running.bench.asked) == (judge == "reward") and not running.chunks
