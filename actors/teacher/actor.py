"""Score chunks with the teacher: prefill-only requests for new tokens, in token-budget batches.

    chunks (PULL) -> cut points -> a lane for each engine: batcher -> engine -> scored chunks (PUSH) to the intake

    loop             waits for                               unblocked by
    receive          a chunk                                 a rollout actor
    control          a message of the dispatcher            the dispatcher
    dispatch, watch  see `actors/teacher/lane.py`, one of each engine

The actor keeps the tokens of each unfinished sample, because a request carries all ids so far; the prefix cache of the
engine holds their keys and values, so only new tokens are computed. Prompts are dealt to the
engines that can be used, the next one to that with the fewest samples; what is under way of a prompt meets one cache.
On cancel: chunks that were not scored stay with their rollout actor, which sends them again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import aiohttp
import numpy as np

from opd_async.actors.client.engine_client import Endpoint, EngineClient, new_connector
from opd_async.actors.client.pacing import Pacing
from opd_async.actors.client.replies import Scores
from opd_async.actors.teacher.known_tokens import KnownTokens
from opd_async.actors.teacher.lane import Lane, Request
from opd_async.actors.teacher.live_weights import LiveWeights
from opd_async.clock import WALL
from opd_async.config.topology import PauseMode, TrainOn
from opd_async.engines.probe import wait_until_ready
from opd_async.errors import EngineError, EngineFault, RoleError
from opd_async.plan.chunk_bounds import ChunkBounds
from opd_async.plan.plan import RoleKind
from opd_async.role import IdleClock, Role, role_arguments
from opd_async.scheduling.breaker import Failures
from opd_async.scheduling.cache_share import CutPoints
from opd_async.scheduling.routing import Deal
from opd_async.scheduling.score_batches import ScoreItem
from opd_async.scheduling.unproven import Scored
from opd_async.transport import messages as m
from opd_async.transport.channels import Pull
from opd_async.transport.to_intakes import ToIntakes

log = logging.getLogger(__name__)

MAX_QUEUE_BATCHES = 16
"""Receiving stops while this many batches' tokens wait for each engine, so that backpressure reaches the rollout
actors."""


class TeacherActor:
    """One teacher actor and the teacher engines that it drives."""

    def __init__(self, role: Role, session: aiohttp.ClientSession) -> None:
        self._role = role
        self._topology, plan = role.plan.topology, role.plan
        self._metrics = role.metrics
        urls = plan.engines_of(role.mine)
        in_place = self._topology.schedule.pause_mode is PauseMode.IN_PLACE
        self._live = LiveWeights(in_place) if self._topology.opd.on_student_engines else None
        self._pacing = Pacing(role, urls, streams=False)
        self._lanes = [Lane(role, self._client(session, url), self, self._pacing.of(url), self._live) for url in urls]
        self._points = self._new_points()
        self._known = KnownTokens()
        self._deal = Deal()
        self._failures: defaultdict[int, Failures] = defaultdict(Failures)
        self._room = asyncio.Event()
        self._idle = IdleClock()
        role.refresh = self._refresh
        self._door = role.guard()
        self._bounds = ChunkBounds(plan, self._door.keys)
        guard = self._door if plan.guards_chunks else None
        self._pull = Pull(role.context, plan.chunks[role.mine.index], self._malformed, door=guard)
        self._push = ToIntakes(role.context, plan.scored, role.chunk_passport)

    def _client(self, session: aiohttp.ClientSession, url: str) -> EngineClient:
        section, settings = self._role.plan.section(url), self._topology.teacher
        endpoint = Endpoint(
            url=url,
            api_key=section.api_key,
            admin_api_key=section.admin_api_key,
            deadline_s=settings.request_deadline_s,
        )
        plan, topk = self._role.plan, self._topology.opd.wire_topk
        return EngineClient(session, endpoint, plan.vocab_size, topk, rows=plan.table_rows(url))

    def _new_points(self) -> CutPoints:
        schedule = self._topology.schedule
        deadline = schedule.max_staleness if schedule.train_on is TrainOn.TOKENS else None
        return CutPoints(self._topology.rollout.chunk_tokens, deadline)

    async def prepare(self) -> None:
        """Wait for the engines and check each one's scores, and that all agree, before any chunk is scored.

        Engines of the student are not waited for: the run may do without one, and what they hold now is unknown. Their
        lanes look at each once the dispatcher says which weights it has.

        Raises `RoleError`, which names the engine. On cancel: nothing has been started.
        """
        for lane in self._lanes if self._live is None else ():
            url, deadline_s = lane.client.url, self._topology.supervisor.start_deadline_s
            await wait_until_ready(url, "the teacher engine", deadline_s, self._role.plan.section(url).api_key)
            try:
                await lane.canary.check()
            except EngineError as error:
                raise RoleError(f"the teacher cannot score a test text: {error}") from None
            lane.canary.compare(self._lanes[0].canary)

    def start(self) -> None:
        """Start the loops under the role's task group."""
        self._role.spawn(self.receive(), "receive")
        if self._live is None:  # how fast an engine generates says more of it, and rollout actors tell that
            self._role.spawn(self._pacing.tell(), "pace")
        for lane in self._lanes:
            self._role.spawn(lane.dispatch(), f"dispatch {lane.client.url}")
            self._role.spawn(lane.watch(), f"watch {lane.client.url}")

    # --- chunks ------------------------------------------------------------------------------------------------------

    async def receive(self) -> None:
        """Take chunks in; wait while too much is queued. On cancel: chunks in the socket are sent again later."""
        limit = MAX_QUEUE_BATCHES * self._topology.teacher.batch_tokens * len(self._lanes)
        while True:
            sender, chunk = await self._pull.receive_from()
            if not isinstance(chunk, m.Chunk) or chunk.teacher != self._role.mine.teacher:
                self._malformed(f"a {type(chunk).__name__}, or of another teacher")
                continue
            if problem := self._bounds.of_chunk(sender, chunk):
                log.warning("dropped a chunk of sample %d: %s", chunk.sample_id, problem)
                self._malformed(problem)
                continue
            if not self._extended(chunk):
                continue
            if not chunk.sampled:
                await self._pass_on(self._known.given(chunk))
            else:
                self._queue(self._points.offer(chunk, self._lane(chunk).cache.coarse))
            while self._waiting_tokens() > limit:
                self._room.clear()
                await self._room.wait()

    async def _pass_on(self, given: Sequence[m.Chunk]) -> None:
        """Send chunks in which nothing is to be scored."""
        for chunk in given:
            await self._push.send(chunk.scored(self._role.name, 0.0, np.zeros(0, np.float32)))

    def _extended(self, chunk: m.Chunk) -> bool:
        """Extend the sample's tokens; False for a chunk whose beginning this actor has not seen."""
        if not self._known.extend(chunk):
            self._orphan()
            return False
        if chunk.context is not None:  # the sample begins anew here
            self._points.drop(chunk.sample_id)
            for lane in self._lanes:
                lane.batcher.drop(chunk.sample_id)
        return True

    def _orphan(self) -> None:
        """Count a chunk that is dropped: its rollout actor sends it again, with its beginning, if it still matters."""
        self._role.count("orphan_chunks")
        self._metrics["opd_teacher_orphan_chunks_total"].inc()

    def _lane(self, chunk: m.Chunk) -> Lane:
        """The engine of a chunk's prompt, among those that can be used and are not slow; if there is none, among the
        slow ones, then among all."""
        closed = [index for index, lane in enumerate(self._lanes) if lane.guard.closed]
        usable = [index for index in closed if not self._lanes[index].slow] or closed
        return self._lanes[self._deal.of(chunk.sample_id, chunk.prompt_id, usable or range(len(self._lanes)))]

    def _queue(self, chunks: Sequence[m.Chunk]) -> None:
        for chunk in chunks:
            self._lane(chunk).add(chunk)
        self._gauge()

    def _waiting_tokens(self) -> int:
        return sum(lane.batcher.waiting_tokens for lane in self._lanes)

    def _gauge(self) -> None:
        self._metrics["opd_teacher_queue_tokens"].set(self._waiting_tokens())
        self._metrics["opd_teacher_held_tokens"].set(self._points.waiting_tokens)

    # --- what lanes need ---------------------------------------------------------------------------------------------

    def salt(self, item: ScoreItem, live: LiveWeights, mixed: int) -> str:
        """As `KnownTokens.salt`."""
        return self._known.salt(item, live, mixed)

    def requests(self, item: ScoreItem) -> list[Request]:
        """As `KnownTokens.requests`; none for a chunk that came again after its sample had ended."""
        return self._known.requests(item)

    def scored_before(self, item: ScoreItem) -> list[int]:
        """As `KnownTokens.scored_before`."""
        return self._known.scored_before(item)

    async def deliver(self, item: ScoreItem, scores: Sequence[Scores]) -> None:
        """Send the item's chunks with their share of the scores; forget the sample after its last one.

        On cancel: chunks that were not sent stay in the lane's hands, which reroutes them.
        """
        now, first = WALL.now(), item.chunks[0].start
        self._failures.pop(item.sample_id, None)
        for chunk in item.chunks:
            latency_s = max(now - chunk.made_at, 0.0)
            scored = _scored(chunk, scores, chunk.start - first, self._role.name, latency_s)
            if self._live is not None and len(chunk.token_ids):
                version = int(scores[0].weight_version)
                if version < chunk.weight_version:  # of a history from which the run has gone back
                    self._orphan()
                    self._forget_ended(chunk)
                    continue
                scored = replace(scored, scored_version=version)
            await self._push.send(scored)
            await self._pass_on(self._known.sent(chunk))
            sizes = {"start": chunk.start, "end": chunk.end, "version": chunk.weight_version}
            self._role.trace.span("from token to score", "scored", latency_s, sample=chunk.sample_id, **sizes)
            if chunk.finish is not None:
                self._forget_ended(chunk)
                self._metrics["opd_teacher_score_latency_seconds"].observe(latency_s)

    def _forget_ended(self, chunk: m.Chunk) -> None:
        if chunk.finish is not None and self._known.holds(chunk):  # a later attempt needs its own tokens still
            self._known.forget(chunk.sample_id)
            self._deal.forget(chunk.sample_id)

    def reroute(self, chunks: Sequence[m.Chunk]) -> None:
        """Give chunks that an engine could not score to another one; those of given-up attempts are dropped."""
        held = [chunk for chunk in chunks if self._known.holds(chunk)]
        self._metrics["opd_teacher_rerouted_chunks_total"].inc(len(held))
        self._queue(held)

    def count_failure(self, items: Sequence[ScoreItem], fault: EngineFault) -> list[Failures]:
        """Count one more failed try of each sample; returns what went wrong with each since its last score."""
        failures = [self._failures[item.sample_id] for item in items]
        for one in failures:
            one.count(fault)
        return failures

    def is_last_usable(self, lane: Lane) -> bool:
        """Whether no other engine can be used."""
        return not any(other.guard.closed for other in self._lanes if other is not lane)

    def busy_changed(self) -> None:
        """A batch has begun or ended: bring idle time up to date, and let `receive` look for room."""
        self._idle.set_busy(any(lane.busy for lane in self._lanes))
        self._room.set()

    def engine_recovered(self) -> None:
        """An engine can be used again: it takes what waits for those that cannot."""
        for lane in self._lanes:
            if not lane.guard.closed:
                self.reroute(lane.batcher.take_all())

    async def suspect(self, url: str, text: str, scored: Sequence[Scored]) -> None:
        """Say what an engine has scored that is not to be trusted. On cancel: it may or may not have been sent."""
        ids, starts, ends = zip(*scored, strict=True)
        columns = (np.array(ids, np.int64), np.array(starts, np.int32), np.array(ends, np.int32))
        await self._role.control.send(m.SuspectScores(url, text, *columns))

    async def give_up(self, text: str) -> None:
        """End the run with this reason. On cancel: it may or may not have been sent."""
        await self._role.control.send(m.Failure(self._role.name, text))

    def _refresh(self) -> None:
        idle_s = self._idle.total()
        self._metrics["opd_teacher_idle_seconds_total"].inc(idle_s - self._role.counters.get("idle_s", 0.0))
        self._role.counters["idle_s"] = idle_s
        self._gauge()

    # --- dispatcher -------------------------------------------------------------------------------------------------

    async def control(self) -> None:
        """Handle the dispatcher's messages in order. On cancel: the message under way may be half done."""
        while True:
            message = await self._role.control.receive()
            match message:
                case m.Resume():
                    if self._live is not None:
                        self._live.resume(message.version)
                        for lane in self._lanes:
                            lane.holds_weights()
                    self._queue(self._points.advance(message.version))
                case m.Pause() if self._live is not None:
                    await self._pause(self._live, message.request)
                case m.EngineSlow():
                    await self._engine_slow(message)
                case m.EngineChanged():
                    for lane in self._lanes:
                        if lane.client.url == message.url:
                            await lane.suspect(message.text)
                case m.Reset():
                    await self._reset(message.request)
                case m.Stop():
                    self._role.stopped.set()
                case _:
                    log.warning("ignored a %s", type(message).__name__)

    async def _pause(self, live: LiveWeights, request: int) -> None:
        """Score nothing until the next `Resume`: the student's engines are about to be sent weights."""
        live.pause()
        await asyncio.gather(*(lane.pause() for lane in self._lanes))
        none = np.zeros(0, np.int64)
        await self._role.control.send(m.Paused(request, none, none.astype(np.int32), none.astype(np.int32)))

    async def _engine_slow(self, message: m.EngineSlow) -> None:
        """Give the work of an engine that is far slower than its peers to them, or let it have work again."""
        for lane in self._lanes:
            if lane.client.url == message.url:
                lane.slow = message.slow
                if lane.slow and not self.is_last_usable(lane):
                    await lane.hand_over()

    async def _reset(self, request: int) -> None:
        """Forget every sample; batches under way are given up."""
        if self._live is not None:
            self._live.forget()
        self._known.clear()
        self._deal.clear()
        for lane in self._lanes:
            await lane.reset()
        self._points = self._new_points()
        self._failures.clear()
        self._room.set()
        await self._role.control.send(m.ResetDone(self._role.name, request))

    def _malformed(self, reason: str) -> None:
        self._role.count("malformed_frames")
        self._metrics["opd_teacher_malformed_total"].labels("chunk").inc()
        log.warning("not a chunk: %s", reason)

    def close(self) -> None:
        """Close the sockets; scored chunks may still leave."""
        self._pull.close()
        self._push.close()
        self._door.close()


def _scored(chunk: m.Chunk, scores: Sequence[Scores], at: int, teacher_id: str, latency_s: float) -> m.ScoredChunk:
    """The chunk with its scores, which begin at row `at`, behind the teacher's prompt and then behind that of the
    contrast; none: the chunk has no tokens."""
    end = at + len(chunk.token_ids)
    if not scores:
        return chunk.scored(teacher_id, latency_s, np.zeros(0, np.float32))
    own, *others = scores
    scored = chunk.scored(teacher_id, latency_s, own.logprobs[at:end])
    if others:
        scored = replace(scored, contrast_logprobs=others[0].logprobs[at:end])
    if own.topk is None:
        return scored
    topk = own.topk.rows(at, end)
    return replace(scored, topk_ids=topk.ids, topk_logprobs=topk.logprobs)


async def main() -> None:
    """Run one teacher actor until the dispatcher says stop."""
    plan, index = role_arguments("Teacher actor: score partial samples.")
    async with (
        # the session ends last: what still runs is cancelled first, and finds its connections open
        aiohttp.ClientSession(connector=new_connector()) as session,
        Role.open(RoleKind.TEACHER, plan, index) as role,
    ):
        actor = TeacherActor(role, session)
        try:
            role.spawn(actor.control(), "control")
            await actor.prepare()
            actor.start()
            await role.until_stopped()
        finally:
            actor.close()
