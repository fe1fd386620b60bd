"""Score chunks with the teacher: prefill-only requests for new tokens, in token-budget batches.

    chunks (PULL) -> batcher -> engine /generate (max_new_tokens 0) -> scored chunks (PUSH) to the intake

    loop         waits for                               unblocked by
    receive      a chunk                                 a rollout actor
    dispatch     a full or overdue batch, a free slot    a chunk, time, a finished batch
    batch (few)  the engine; the intake's queue          the engine; the intake
    control      a message of the coordinator            the coordinator

The actor keeps the tokens of each unfinished sample, because a request carries all ids so far; the prefix cache of the
engine holds their keys and values, so only new tokens are computed.
On cancel: chunks that were not scored stay with their rollout actor, which sends them again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import aiohttp
import numpy as np
from numpy.typing import NDArray

from actors.canary import check_teacher
from actors.engine_client import EngineClient, new_connector
from actors.replies import Scores
from opd_async import messages as m
from opd_async.batching import ScoreItem, TokenBudgetBatcher
from opd_async.channels import Pull, Push
from opd_async.errors import EngineError
from opd_async.plan import RoleKind
from opd_async.probe import wait_until_ready
from opd_async.process import run_role
from opd_async.role import IdleClock, Role, role_arguments

log = logging.getLogger(__name__)

Request = tuple[NDArray[np.int32], int]
"""int32[N] token ids, and the index of the first one to score."""

RETRY_S = 0.2
MAX_QUEUE_BATCHES = 16
"""Receiving stops while this many batches' tokens wait, so that backpressure reaches the rollout actors."""


class TeacherActor:
    """One teacher actor and the teacher engines that it drives."""

    def __init__(self, role: Role, session: aiohttp.ClientSession) -> None:
        self._role = role
        topology, plan = role.plan.topology, role.plan
        self._settings = topology.teacher
        self._metrics = role.metrics
        section = topology.engines.teacher
        urls = plan.teacher_engines[role.mine.index :: topology.teacher.replicas]
        self._clients = [
            EngineClient(
                session,
                url,
                plan.vocab_size,
                section.api_key,
                section.admin_api_key,
                topology.opd.wire_topk,
                self._settings.request_deadline_s,
            )
            for url in urls
        ]
        self._batcher = TokenBudgetBatcher(self._settings.batch_tokens, self._settings.max_wait_ms / 1000)
        self._ids: dict[int, tuple[int, NDArray[np.int32]]] = {}
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._slots = asyncio.Semaphore(self._settings.max_in_flight * len(self._clients))
        self._batches: set[asyncio.Task[None]] = set()
        self._next_client = 0
        self._idle = IdleClock()
        role.refresh = self._refresh
        self._pull = Pull(role.context, plan.chunks[role.mine.index], self._malformed)
        self._push = Push(role.context, plan.scored)

    async def prepare(self) -> None:
        """Wait for the engines and check that each is a sane teacher, before any chunk is scored."""
        for client in self._clients:
            await self._ready(client)
            await check_teacher(client, self._role.plan.vocab_size)

    async def _ready(self, client: EngineClient) -> None:
        topology = self._role.plan.topology
        api_key = topology.engines.teacher.api_key
        await wait_until_ready(client.url, "the teacher engine", topology.supervisor.start_deadline_s, api_key)

    async def receive(self) -> None:
        """Take chunks in; wait while too much is queued."""
        limit = MAX_QUEUE_BATCHES * self._settings.batch_tokens
        while True:
            chunk = await self._pull.receive()
            if not isinstance(chunk, m.Chunk):
                self._malformed(f"a {type(chunk).__name__}")
                continue
            if self._known(chunk):
                self._batcher.add(chunk, time.monotonic())
                self._changed.set()
            self._metrics["opd_teacher_queue_tokens"].set(self._batcher.waiting_tokens)
            while self._batcher.waiting_tokens > limit:
                self._room.clear()
                await self._room.wait()

    def _known(self, chunk: m.Chunk) -> bool:
        """Extend the sample's tokens; False for a chunk whose beginning this actor has not seen."""
        known = self._ids.get(chunk.sample_id)
        if chunk.context is not None:
            self._batcher.drop(chunk.sample_id)
            prefix = chunk.context
        elif known is not None and known[0] == chunk.attempt and len(known[1]) == chunk.prompt_tokens + chunk.start:
            prefix = known[1]
        else:
            self._role.count("orphan_chunks")
            self._metrics["opd_teacher_orphan_chunks_total"].inc()
            return False
        self._ids[chunk.sample_id] = (chunk.attempt, np.concatenate([prefix, chunk.token_ids]))
        return True

    async def dispatch(self) -> None:
        """Let batches go as they fill or fall due, a bounded number at once."""
        while True:
            await self._slots.acquire()
            batch = await self._next_batch()
            # no await between taking a batch and reading its tokens: a reset may forget them at any other time
            requests = [self._request(item) for item in batch]
            task = self._role.spawn(self._batch(batch, requests), "batch")
            self._batches.add(task)
            self._idle.set_busy(True)
            task.add_done_callback(self._ended)

    async def _next_batch(self) -> list[ScoreItem]:
        while True:
            now = time.monotonic()
            if batch := self._batcher.take(now):
                return batch
            due = self._batcher.due_at()
            self._changed.clear()
            try:
                async with asyncio.timeout(None if due is None else max(due - now, 0.0)):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        self._idle.set_busy(bool(self._batches))
        self._slots.release()
        self._changed.set()
        self._room.set()

    async def _batch(self, batch: Sequence[ScoreItem], requests: Sequence[Request | None]) -> None:
        try:
            pairs = zip(batch, requests, strict=True)
            to_score = [(item, request) for item, request in pairs if request is not None and item.new_tokens]
            scores = await self._score([request for _, request in to_score]) if to_score else []
            by_sample = {item.sample_id: score for (item, _), score in zip(to_score, scores, strict=True)}
            for item, request in zip(batch, requests, strict=True):
                if request is not None:
                    await self._deliver(item, by_sample.get(item.sample_id))
            self._account(batch, scores)
        finally:
            self._batcher.done([item.sample_id for item in batch])
            self._changed.set()

    def _request(self, item: ScoreItem) -> Request | None:
        """All ids so far, and where the new ones begin; None for a chunk that came again after its sample had ended."""
        first, last = item.chunks[0], item.chunks[-1]
        known = self._ids.get(item.sample_id)
        if known is None:
            return None
        return known[1][: last.prompt_tokens + last.end], first.prompt_tokens + first.start

    async def _score(self, requests: Sequence[Request]) -> list[Scores]:
        """Score one batch, through failures; beyond the retry budget the run ends with the reason."""
        failures = 0
        while True:
            client = self._clients[self._next_client % len(self._clients)]
            self._next_client += 1
            try:
                return await client.score(requests)
            except EngineError as error:
                failures += 1
                self._role.count("teacher_retries")
                self._metrics["opd_teacher_retries_total"].inc()
                log.warning("scoring failed (%d): %s", failures, error)
                if failures > self._settings.request_retries:
                    await self._ready(client)
                if failures > 2 * self._settings.request_retries:
                    text = f"the teacher engine cannot score, {failures} tries, last: {error}"
                    await self._role.control.send(m.Failure(self._role.name, text))
                await asyncio.sleep(RETRY_S * 2 ** min(failures, 5))

    async def _deliver(self, item: ScoreItem, scores: Scores | None) -> None:
        """Send the item's chunks with their share of the scores; forget the sample after its last one."""
        now, at = time.time(), 0
        for chunk in item.chunks:
            n = len(chunk.token_ids)
            logprobs = scores.logprobs[at : at + n] if scores is not None else np.zeros(0, np.float32)
            topk = scores.topk.rows(at, at + n) if scores is not None and scores.topk is not None else None
            at += n
            await self._push.send(
                m.ScoredChunk(
                    chunk.sample_id,
                    chunk.attempt,
                    chunk.actor,
                    chunk.prompt_id,
                    chunk.prompt_tokens,
                    chunk.start,
                    chunk.weight_version,
                    chunk.finish,
                    chunk.label,
                    self._role.name,
                    max(now - chunk.made_at, 0.0),
                    chunk.token_ids,
                    chunk.behaviour_logprobs,
                    logprobs,
                    chunk.context,
                    topk.ids if topk is not None else None,
                    topk.logprobs if topk is not None else None,
                    chunk.reward,
                )
            )
            if chunk.finish is not None:
                self._ids.pop(chunk.sample_id, None)
                self._metrics["opd_teacher_score_latency_seconds"].observe(max(now - chunk.made_at, 0.0))

    def _account(self, batch: Sequence[ScoreItem], scores: Sequence[Scores]) -> None:
        new_tokens = sum(item.new_tokens for item in batch)
        prompt_tokens = sum(score.prompt_tokens for score in scores)
        cached_tokens = sum(score.cached_tokens for score in scores)
        self._role.count("tokens", new_tokens)
        self._role.count("cached_tokens", cached_tokens)
        self._role.count("computed_tokens", prompt_tokens - cached_tokens)
        self._metrics["opd_teacher_scored_tokens_total"].inc(new_tokens)
        self._metrics["opd_teacher_cached_tokens_total"].inc(cached_tokens)
        self._metrics["opd_teacher_computed_tokens_total"].inc(prompt_tokens - cached_tokens)
        self._metrics["opd_teacher_batches_total"].inc()
        self._metrics["opd_teacher_batch_tokens"].observe(new_tokens)

    def _refresh(self) -> None:
        idle_s = self._idle.total()
        self._metrics["opd_teacher_idle_seconds_total"].inc(idle_s - self._role.counters.get("idle_s", 0.0))
        self._role.counters["idle_s"] = idle_s

    async def control(self) -> None:
        """Handle the coordinator's messages."""
        while True:
            message = await self._role.control.receive()
            match message:
                case m.Reset():
                    await self._reset(message.token)
                case m.Stop():
                    self._role.stopped.set()
                case _:
                    log.warning("ignored a %s", type(message).__name__)

    async def _reset(self, token: int) -> None:
        """Forget every sample; batches under way are given up."""
        batches = list(self._batches)
        for task in batches:
            task.cancel()
        if batches:
            await asyncio.wait(batches, timeout=10.0)
        self._batcher = TokenBudgetBatcher(self._settings.batch_tokens, self._settings.max_wait_ms / 1000)
        self._ids.clear()
        self._room.set()
        await self._role.control.send(m.ResetDone(self._role.name, token))

    def _malformed(self, reason: str) -> None:
        self._role.count("malformed_frames")
        self._metrics["opd_teacher_malformed_total"].labels("chunk").inc()
        log.warning("not a chunk: %s", reason)

    def close(self) -> None:
        """Close the sockets; scored chunks may still leave."""
        self._pull.close()
        self._push.close()


async def main() -> None:
    """Run one teacher actor until the coordinator says stop."""
    plan, index = role_arguments("Teacher actor: score partial samples.")
    async with (
        Role.open(RoleKind.TEACHER, plan, index) as role,
        aiohttp.ClientSession(connector=new_connector()) as session,
    ):
        actor = TeacherActor(role, session)
        try:
            role.spawn(actor.control(), "control")
            await actor.prepare()
            role.spawn(actor.receive(), "receive")
            role.spawn(actor.dispatch(), "dispatch")
            await role.until_stopped()
        finally:
            actor.close()


if __name__ == "__main__":
    run_role(main)
