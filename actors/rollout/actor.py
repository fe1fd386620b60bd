"""Generate with the student and stream partial samples to the teachers.

    leases (control) -> engine /generate (stream) -> buffer -> chunks -> outbox -> PUSH to a teacher actor (or intake)
                                                                 | end    ^ acknowledgements (control)
                                                              reward workers

    loop       waits for                                    unblocked by
    control    a message of the dispatcher                 the dispatcher
    lease (N)  the next streamed tokens; an open gate       the engine; `Resume` after a weight update
    resend     a chunk without acknowledgement              time
    on pause   every token that the engines say they sent   the leases' streams

A chunk leaves at `chunk_tokens` new tokens, when the weight version changes, when the response ends and at each pause.
On cancel: streams close (the engine aborts them); what was sent stays the dispatcher's to reclaim.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Iterable

import aiohttp
import numpy as np

from opd_async.actors.client.engine_client import EngineClient, new_connector
from opd_async.actors.client.guard import Guard
from opd_async.actors.client.replies import Delta
from opd_async.actors.client.routed_client import GenerationClient, RoutedClient
from opd_async.actors.rollout.downstream import Downstream
from opd_async.actors.rollout.generation import Generation, Student
from opd_async.actors.rollout.judging import Judging
from opd_async.actors.rollout.streams import PAUSE_DEADLINE_S, Streams
from opd_async.config.topology import EngineKind, PauseMode
from opd_async.errors import EngineError, EngineFault
from opd_async.plan.plan import RoleKind
from opd_async.role import IdleClock, Role, role_arguments
from opd_async.scheduling.breaker import PASSING, backoff_s, given_up
from opd_async.scheduling.outbox import Outbox
from opd_async.transport import messages as m
from opd_async.transport.wire import Int32

log = logging.getLogger(__name__)


class AbortedError(EngineError):
    """The engine ended the request before the response was complete; its tokens so far are good."""


class RolloutActor:
    """One rollout actor and the student engines that it drives."""

    def __init__(self, role: Role, session: aiohttp.ClientSession) -> None:
        self._role = role
        topology = role.plan.topology
        self._settings = topology.rollout
        # the embedded engine accounts for every token when it pauses; SGLang does so only when a request ends
        self._drains = topology.engines.student.kind is not EngineKind.EMBEDDED
        self._keeps_cache = self._drains and topology.schedule.pause_mode is PauseMode.IN_PLACE
        self._metrics = role.metrics
        self._students = self._find_students(session)
        self._teachers = {
            name: [self._client(session, url) for url in urls] for name, urls in role.plan.teacher_urls.items()
        }
        self._downstream = Downstream(role.context, role.plan, role.name)
        gauge = self._metrics["opd_rollout_breaker_open"]
        clients = [student.client for student in self._students]
        clients += [client for teacher in self._teachers.values() for client in teacher]
        self._guards = {client.url: Guard(client.url, gauge.labels(client.url)) for client in clients}
        self._outage_s = topology.supervisor.start_deadline_s
        self._judging = Judging(role)
        self._outbox = Outbox()
        self._streams = Streams(topology.schedule.pause_mode, self._drains)
        self._live = self._streams.live
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._idle = IdleClock()
        role.refresh = self._account
        self._paused_at: float | None = time.monotonic()

    def _find_students(self, session: aiohttp.ClientSession) -> list[Student]:
        """The engines that this actor drives: every `replicas`-th, so that all are driven by exactly one; all of them
        as one where a router decides which of them a request meets."""
        urls, router = self._role.plan.student_engines, self._role.plan.topology.engines.student.router
        if router is None:
            mine = urls[self._role.mine.index :: self._role.plan.topology.rollout.replicas]
            return [Student(self._client(session, url), (url,)) for url in mine]
        engines = [self._client(session, url) for url in urls]
        return [Student(RoutedClient(self._client(session, router.rstrip("/")), engines), urls)]

    def _client(self, session: aiohttp.ClientSession, url: str) -> EngineClient:
        section = self._role.plan.section(url)
        vocab_size, deadline_s = self._role.plan.vocab_size, self._settings.request_deadline_s
        return EngineClient(
            session, url, vocab_size, section.api_key, section.admin_api_key, request_deadline_s=deadline_s
        )

    async def control(self) -> None:
        """Handle the dispatcher's messages in order."""
        while True:
            message = await self._role.control.receive()
            match message:
                case m.Lease():
                    self._start(message)
                case m.Acks():
                    self._acknowledge(message)
                case m.Pause():
                    await self._pause(message.token)
                case m.Resume():
                    await self._resume(message.version)
                case m.EngineDown():
                    self._engine_down(message.url)
                case m.TeacherRestarted():
                    await self._send_again(self._outbox.teacher_restarted(message.index, time.monotonic()))
                case m.Reset():
                    await self._reset(message.token)
                case m.Stop():
                    self._role.stopped.set()
                case _:
                    log.warning("ignored a %s", type(message).__name__)

    def start(self) -> None:
        """Start the loops under the role's task group."""
        self._judging.start()
        self._role.spawn(self.control(), "control")
        self._role.spawn(self.resend(), "resend")

    async def resend(self) -> None:
        """Send chunks again that nobody acknowledged in time."""
        after_s = self._settings.resend_after_s
        while True:
            await asyncio.sleep(min(1.0, after_s / 4))
            await self._send_again(self._outbox.overdue(time.monotonic(), after_s))
            self._metrics["opd_rollout_unacknowledged_chunks"].set(self._outbox.unacknowledged)

    def close(self) -> None:
        """Close the sockets; queued chunks may still leave."""
        self._downstream.close()

    # --- leases ------------------------------------------------------------------------------------------------------

    def _start(self, lease: m.Lease) -> None:
        student = self._students[lease.prompt_id % len(self._students)]
        rid = f"{lease.sample_id:016x}-{uuid.uuid4().hex[:12]}"
        generation = Generation(lease, rid, student, awaits_reward=self._judging.wants(lease))
        if lease.kind == m.LeaseKind.TRAIN:
            route = self._downstream.route(lease.prompt_id, lease.teacher)
            self._outbox.open(lease.sample_id, lease.attempt, route, lease.prompt, lease.prefix)
        self._live[lease.sample_id] = generation
        self._tasks[lease.sample_id] = self._role.spawn(self._run(generation), f"lease-{lease.sample_id}")
        self._account()

    async def _run(self, generation: Generation) -> None:
        """One lease, through broken streams and restarts of its engine, to its end."""
        lease = generation.lease
        try:
            while generation.finish is None:
                await self._attempt(generation)
            if lease.kind == m.LeaseKind.TRAIN:
                done = m.LeaseDone(lease.sample_id, lease.attempt, generation.length, generation.finish.value)
                await self._role.control.send(done)
            reward = await self._judging.judge(generation) if generation.awaits_reward else None
            if lease.kind != m.LeaseKind.TRAIN:
                await self._role.control.send(generation.evaluation(reward))
            elif generation.awaits_reward:
                generation.rewarded(reward)
                await self._flush(generation)
        finally:
            self._live.pop(lease.sample_id, None)
            self._tasks.pop(lease.sample_id, None)
            self._account()

    async def _attempt(self, generation: Generation) -> None:
        """Generate until the response ends or the request fails; failures are counted and bounded."""
        lease, longest = generation.lease, generation.max_tokens(self._settings)
        generation.finish = generation.natural_finish(longest, self._role.plan.stop_token_ids)
        if generation.finish is not None:
            await self._flush(generation)
            return
        if lease.given is not None:
            await self._give(generation, lease.given)
            return
        on_teacher = lease.kind == m.LeaseKind.EVAL_TEACHER
        client: GenerationClient = generation.student.client
        if on_teacher:
            engines = self._teachers[lease.teacher]
            usable = [engine for engine in engines if self._guards[engine.url].closed] or engines
            client = usable[lease.sample_id % len(usable)]
        await self._admitted(generation, client, on_teacher)
        generation.streaming = not on_teacher
        try:
            await self._stream(generation, client, on_teacher)
        except EngineError as error:
            if isinstance(error, AbortedError) and self._expects_aborts(generation.student):
                generation.new_request()
            else:
                await self._failed(generation, client, error)

    async def _give(self, generation: Generation, response: Int32) -> None:
        """A response that a data set gives, in chunks: as if the present weights had been certain of every token."""
        student, size = generation.student, self._settings.chunk_tokens
        while generation.finish is None:
            while not student.gate.is_set():
                await student.gate.wait()
            ids = response[generation.length : generation.length + size]
            ends = generation.length + len(ids) == len(response)
            finish, certain = m.Finish.STOP if ends else None, np.zeros(len(ids), np.float32)
            generation.take(Delta(ids, certain, str(student.version), finish, aborted=False), False, ())
            await self._flush(generation)  # into the outbox before anybody else runs, so that a pause counts it

    def _expects_aborts(self, student: Student) -> bool:
        """A drain aborts requests: this actor's own, or, behind a router, that of another one."""
        return self._drains and (student.routed or not student.gate.is_set())

    async def _admitted(self, generation: Generation, client: GenerationClient, on_teacher: bool) -> None:
        """Wait for an open gate and a breaker that lets the request through, both at once."""
        while True:
            if not on_teacher:
                await generation.student.gate.wait()
            await self._guards[client.url].admission()
            if on_teacher or generation.student.gate.is_set():
                return

    async def _stream(self, generation: Generation, client: GenerationClient, on_teacher: bool) -> None:
        """One request, to the end of its stream."""
        request = generation.sampling(self._settings, self._role.plan.stop_token_ids)
        key = "" if on_teacher else generation.cache_key(self._keeps_cache)
        try:
            async for delta in client.stream(generation.rid, generation.input_ids(), request, key):
                await self._take(generation, delta, on_teacher)
                self._guards[client.url].succeeded()
            if generation.finish is None:
                raise EngineError(f"{client.url}: the stream ended without a finish reason")
        finally:
            generation.streaming = False
            await self._streams.progressed()

    async def _take(self, generation: Generation, delta: Delta, on_teacher: bool) -> None:
        new_tokens = generation.take(delta, on_teacher, self._role.plan.stop_token_ids)
        if generation.lease.kind == m.LeaseKind.TRAIN:
            self._role.count("tokens", new_tokens)
            self._metrics["opd_rollout_tokens_total"].inc(new_tokens)
            for chunk in generation.due_chunks(self._settings.chunk_tokens, self._role.mine.index):
                await self._send(chunk)
        await self._streams.progressed()
        if delta.aborted:
            raise AbortedError("the engine aborted the request")

    async def _failed(self, generation: Generation, client: GenerationClient, error: EngineError) -> None:
        guard = self._guards[client.url]
        on_teacher = generation.lease.kind == m.LeaseKind.EVAL_TEACHER
        gate_open = on_teacher or generation.student.gate.is_set()
        if error.fault is EngineFault.SILENT and not gate_open:
            generation.new_request()  # paused engines say nothing
            return
        log.warning("sample %d: %s", generation.lease.sample_id, error)
        self._role.count("engine_errors")
        self._metrics["opd_rollout_engine_errors_total"].labels(error.fault.value).inc()
        guard.failed(error)
        generation.failures += error.fault not in PASSING
        # an engine that is being restarted does not count against the request: its gate is closed
        hopeless = given_up(error.fault, generation.failures, self._settings.request_retries)
        if gate_open and (hopeless or guard.failing_s > self._outage_s):
            text = f"sample {generation.lease.sample_id}: {client.url} fails again and again, last: {error}"
            await self._role.control.send(m.Failure(self._role.name, text))
            await asyncio.Event().wait()  # the run ends now; this lease has nothing left to do
        generation.new_request()
        await asyncio.sleep(backoff_s(max(generation.failures, 1), random.random))

    # --- chunks ------------------------------------------------------------------------------------------------------

    async def _flush(self, generation: Generation) -> None:
        if generation.lease.kind == m.LeaseKind.TRAIN:
            for chunk in generation.due_chunks(1, self._role.mine.index):
                await self._send(chunk)

    async def _send(self, chunk: m.Chunk) -> None:
        self._metrics["opd_rollout_chunks_total"].inc()
        outgoing = self._outbox.add(chunk, time.monotonic())
        await self._downstream.send(self._outbox.teacher_of(chunk.sample_id), outgoing)

    async def _send_again(self, pairs: Iterable[tuple[int, m.Chunk]]) -> None:
        for teacher, chunk in pairs:
            self._role.count("resent_chunks")
            self._metrics["opd_rollout_resent_chunks_total"].inc()
            await self._downstream.send(teacher, chunk)

    def _acknowledge(self, acks: m.Acks) -> None:
        now = time.monotonic()
        for sample_id, attempt, end in zip(acks.sample_ids, acks.attempts, acks.ends, strict=True):
            self._outbox.acknowledge(int(sample_id), int(attempt), int(end), now)

    # --- pausing -----------------------------------------------------------------------------------------------------

    async def _pause(self, token: int) -> None:
        """Stop the engines and deliver every token made so far; then say which tokens exist."""
        if self._paused_at is None:
            self._paused_at = time.monotonic()
        for student in self._students:
            student.gate.clear()
        up = [student for student in self._students if not student.down]
        results = await asyncio.gather(*(self._streams.stop(student) for student in up))
        emitted = {rid: count for counts in results for rid, count in counts.items()}
        await self._streams.all_arrived(emitted)
        for generation in list(self._live.values()):
            await self._flush(generation)
        ends = np.array(self._outbox.ends(), np.int64).reshape(-1, 3)
        paused = m.Paused(token, ends[:, 0], ends[:, 1].astype(np.int32), ends[:, 2].astype(np.int32))
        await self._role.control.send(paused)
        self._account()

    async def _resume(self, version: int) -> None:
        for student in self._students:
            student.version = version
            student.down = False
            try:
                await student.client.resume()
            except EngineError as error:
                log.warning("continue: %s; waiting for its restart", error)
                student.lost()
                continue
            self._guards[student.client.url].reset()
            student.gate.set()
        if self._paused_at is not None:
            blocked = time.monotonic() - self._paused_at
            self._metrics["opd_rollout_blocked_seconds_total"].inc(blocked)
            self._paused_at = None
        self._account()

    def _engine_down(self, url: str) -> None:
        for student in self._students:
            if url in student.urls:
                student.lost()

    async def _reset(self, token: int) -> None:
        """Forget every sample: the run goes back to a checkpoint."""
        for student in self._students:
            student.gate.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=PAUSE_DEADLINE_S)
        self._outbox.clear()
        await self._role.control.send(m.ResetDone(self._role.name, token))

    def _account(self) -> None:
        """Bring idle time and gauges up to date."""
        running = self._streams.running
        self._idle.set_busy(running > 0)
        previous = self._role.counters.get("idle_s", 0.0)
        self._role.counters["idle_s"] = self._idle.idle_s
        self._metrics["opd_rollout_idle_seconds_total"].inc(self._idle.idle_s - previous)
        self._metrics["opd_rollout_running_requests"].set(running)


async def main() -> None:
    """Run one rollout actor until the dispatcher says stop."""
    plan, index = role_arguments("Rollout actor: generate and stream partial samples.")
    async with (
        # the session ends last: what still runs is cancelled first, and finds its connections open
        aiohttp.ClientSession(connector=new_connector()) as session,
        Role.open(RoleKind.ROLLOUT, plan, index) as role,
    ):
        actor = RolloutActor(role, session)
        actor.start()
        await role.until_stopped()
        actor.close()
