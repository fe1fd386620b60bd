"""A rollout actor at work on one episode against an engine that says what a test has written down."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from fake_role import Dispatcher, fake_role, make_plan, until, value
from talking_engine import END, ENDS, START, VOCAB, TalkingEngine, write_tokenizer

from opd_async.actors.client.engine_client import new_connector
from opd_async.actors.rollout import episodes
from opd_async.actors.rollout.actor import RolloutActor
from opd_async.actors.rollout.session import Session
from opd_async.plan.plan import RoleKind
from opd_async.role import Role
from opd_async.transport import messages as m
from opd_async.transport.bounds import problem
from opd_async.transport.channels import Pull

Episode = Callable[[Session, dict[str, Any]], Awaitable[Any]]
LONGEST = 600
PROMPT = f"{START}user\nAdd 2 and 3{END}\n{START}assistant\n"


class Running:
    """A rollout actor at work on one lease, and its chunks."""

    def __init__(self, role: Role, dispatcher: Dispatcher, tokenizer: Any) -> None:
        self.role, self.dispatcher, self.tokenizer = role, dispatcher, tokenizer
        self.chunks: list[m.ScoredChunk] = []
        self.further: dict[int, list[m.ScoredChunk]] = {}
        """Those of further samples."""
        self._pull = Pull(role.context, role.plan.scored[0])

    async def collect(self) -> None:
        while True:
            chunk = await self._pull.receive()
            assert problem(chunk) is None
            chunks = self.chunks if chunk.episode is None else self.further.setdefault(chunk.sample_id, [])
            if not any(chunk.start == one.start and chunk.end == one.end for one in chunks):  # nobody acknowledges
                chunks.append(chunk)

    async def lease(self, prefix: list[int] | None = None, kind: m.LeaseKind = m.LeaseKind.TRAIN) -> None:
        lease = m.Lease(
            sample_id=9,
            attempt=1,
            prompt_id=5,
            kind=kind.value,
            temperature=1.0,
            label="5",
            prompt=np.array(self.tokenizer.encode(PROMPT).ids, np.int32),
            prefix=np.array(prefix or [], np.int32),
        )
        await self.dispatcher.to_role.put(lease)

    async def end(self) -> m.ScoredChunk:
        await until(lambda: bool(self.dispatcher.of(m.LeaseDone)), "the end")
        await until(lambda: bool(self.chunks) and self.chunks[-1].finish is not None, "the last chunk")
        return self.chunks[-1]

    async def evaluated(self) -> m.EvalDone:
        """What comes of an evaluation."""
        await until(lambda: bool(self.dispatcher.of(m.EvalDone)), "the end of the evaluation")
        [done] = self.dispatcher.of(m.EvalDone)
        assert isinstance(done, m.EvalDone)
        return done

    async def further_ends(self, count: int) -> list[m.ScoredChunk]:
        """The last chunk of each of so many further samples, in their order."""

        def ended() -> bool:
            return sum(chunks[-1].finish is not None for chunks in self.further.values()) == count

        await until(ended, f"the ends of {count} further samples")
        assert len(self.further) == count
        return [self.further[sample_id][-1] for sample_id in sorted(self.further)]

    def text(self, sampled: bool, sample_id: int | None = None) -> list[str]:
        """The text of each run of tokens that were sampled, or given; of the lease's sample, or a further one."""
        runs: list[tuple[bool, list[int]]] = []
        for chunk in self.chunks if sample_id is None else self.further[sample_id]:
            if runs and runs[-1][0] == chunk.sampled:
                runs[-1][1].extend(chunk.token_ids.tolist())
            elif len(chunk.token_ids):
                runs.append((chunk.sampled, chunk.token_ids.tolist()))
        return [self.tokenizer.decode(ids, skip_special_tokens=False) for kind, ids in runs if kind == sampled]

    def counted(self, result: str) -> float:
        return value(self.role, "opd_rollout_chat_requests_total", result=result)

    def ended(self, end: str) -> float:
        return value(self.role, "opd_rollout_episodes_total", end=end)


@asynccontextmanager
async def rollout(
    episode: Episode,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *answers: str,
    deadline_s: float = 3000.0,
    reward: str = "episode",
    **sections: Any,
) -> AsyncIterator[tuple[Running, TalkingEngine]]:
    tokenizer = write_tokenizer(folder)
    monkeypatch.setattr(episodes, "load_hook", lambda key, path: episode)
    async with TalkingEngine(tokenizer, *answers) as engine:
        plan = make_plan(
            VOCAB,
            (engine.url,),
            (),
            models={"student": {"path": str(folder)}},
            rollout={
                "chunk_tokens": 4,
                "sampling": {"max_response_tokens": LONGEST},
                "function": "my:episode",
                "endpoint": True,
                "episode_deadline_s": deadline_s,
                **sections,
            },
            opd={"use_opd": False},
            reward={"kind": reward},
            evaluation={"judge": "reward"},
        )
        plan = plan.model_copy(update={"stop_token_ids": (ENDS,)})
        async with (
            aiohttp.ClientSession(connector=new_connector()) as session,
            fake_role(plan, RoleKind.ROLLOUT) as (role, dispatcher),
        ):
            actor = RolloutActor(role, session)
            running = Running(role, dispatcher, tokenizer)
            role.spawn(running.collect(), "collect")
            actor.start()
            await dispatcher.to_role.put(m.Resume(0))
            yield running, engine
            actor.close()
