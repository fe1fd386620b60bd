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
import uuid
from contextlib import aclosing
from dataclasses import replace

import aiohttp
import numpy as np

from opd_async.actors.client.engine_client import new_connector
from opd_async.actors.client.pacing import Pacing
from opd_async.actors.client.replies import Delta
from opd_async.actors.client.routed_client import GenerationClient
from opd_async.actors.rollout.abort_and_collect import AbortedError
from opd_async.actors.rollout.comparing import Comparing
from opd_async.actors.rollout.delivery import Delivery
from opd_async.actors.rollout.engines import Engines
from opd_async.actors.rollout.episode_generation import EpisodeGeneration
from opd_async.actors.rollout.episodes import Episodes
from opd_async.actors.rollout.further import FurtherLeases
from opd_async.actors.rollout.generation import Generation
from opd_async.actors.rollout.judging import Judging
from opd_async.actors.rollout.samples import Work
from opd_async.actors.rollout.streams import PAUSE_DEADLINE_S, Streams
from opd_async.config.topology import EngineKind, PauseMode
from opd_async.errors import EngineError, EngineFault
from opd_async.plan.plan import RoleKind
from opd_async.role import IdleClock, Role, role_arguments
from opd_async.scheduling.breaker import backoff_s
from opd_async.scheduling.further import MAX_FURTHER
from opd_async.transport import messages as m
from opd_async.transport.wire import Int32

log = logging.getLogger(__name__)


class RolloutActor:
    """One rollout actor and the student engines that it drives."""

    def __init__(self, role: Role, session: aiohttp.ClientSession) -> None:
        self._role = role
        topology = role.plan.topology
        self._settings = topology.rollout
        # the embedded engine accounts for every token when it pauses; SGLang does so only when a request ends. One that
        # scores too is not to stand still: a step may wait for the scores of what it has generated
        embedded = topology.engines.student.kind is EngineKind.EMBEDDED
        must_abort = not embedded or topology.opd.on_student_engines
        self._keeps_cache = must_abort and topology.schedule.pause_mode is PauseMode.IN_PLACE
        self._metrics = role.metrics
        self._clock = role.clock
        self._engines = Engines(role, session)
        self._pacing = Pacing(role, [student.client.url for student in self._engines.students], streams=True)
        self._delivery = Delivery(role)
        self._outage_s = topology.supervisor.start_deadline_s
        self._judging = Judging(role)
        self._episodes = Episodes(role)
        self._further_leases = FurtherLeases(role)
        self._work = Work(
            generate=self._until_ended,
            deliver=self._delivery.send_all,
            begun=self._delivery.begun,
            further=self._further,
            left=self._further_left,
        )
        self._comparing = Comparing(role, self._engines)
        self._streams = Streams(topology.schedule.pause_mode, must_abort, role.clock)
        self._live = self._streams.live
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._idle = IdleClock()
        role.refresh = self._update_gauges
        self._paused_at: float | None = self._clock.now()

    async def control(self) -> None:
        """Handle the dispatcher's messages in order. On cancel: the message under way may be half done."""
        while True:
            message = await self._role.control.receive()
            match message:
                case m.Lease():
                    self._begin_lease(message)
                case m.FurtherLease():
                    await self._further_leases.granted(message)
                case m.Acks():
                    self._delivery.acknowledge(message)
                case m.Pause():
                    await self._pause(message.request)
                case m.Resume():
                    await self._resume(message.version)
                case m.EngineDown():
                    self._engine_down(message.url)
                case m.EngineSlow():
                    self._engine_slow(message)
                case m.TeacherRestarted():
                    await self._delivery.teacher_restarted(message.index)
                case m.Reset():
                    await self._reset(message.request)
                case m.Stop():
                    self._role.stopped.set()
                case _:
                    log.warning("ignored a %s", type(message).__name__)

    def start(self) -> None:
        """Start the loops under the role's task group."""
        self._judging.start()
        self._episodes.start()
        self._role.spawn(self.control(), "control")
        self._role.spawn(self._delivery.resend(), "resend")
        self._role.spawn(self._pacing.tell(), "pace")

    def close(self) -> None:
        """Close the sockets; queued chunks may still leave."""
        self._delivery.close()

    # --- leases ------------------------------------------------------------------------------------------------------

    def _begin_lease(self, lease: m.Lease) -> None:
        student = self._engines.student_of(lease.prompt_id)
        rid = f"{lease.sample_id:016x}-{uuid.uuid4().hex[:12]}"
        judged = self._judging.wants(lease)
        if self._episodes.wants(lease):
            generation: Generation = self._episodes.generation(lease, rid, student, awaits_reward=judged)
        else:
            generation = Generation(lease=lease, rid=rid, student=student, awaits_reward=judged)
        if lease.kind == m.LeaseKind.TRAIN:
            self._delivery.open(lease)
        self._live[lease.sample_id] = generation
        self._tasks[lease.sample_id] = self._role.spawn(self._run(generation), f"lease-{lease.sample_id}")
        self._update_gauges()

    async def _run(self, generation: Generation) -> None:
        """One lease, through broken streams and restarts of its engine, to its end."""
        lease, samples = generation.lease, [generation]
        try:
            if isinstance(generation, EpisodeGeneration):
                samples += await self._episodes.run(generation, self._work)
            else:
                await self._until_ended(generation)
            if lease.kind == m.LeaseKind.TRAIN:
                for one in samples:
                    await self._role.control.send(one.done())
            reward = await self._judging.judge(generation) if generation.awaits_reward else generation.reward
            if lease.kind != m.LeaseKind.TRAIN:
                compared = await self._comparing.compare(generation) if self._comparing.wants(lease) else None
                await self._role.control.send(generation.evaluation(reward, compared))
            elif generation.awaits_reward:
                for one in samples:
                    one.rewarded(reward)
                    await self._delivery.send_all(one)
        finally:
            self._live.pop(lease.sample_id, None)
            self._tasks.pop(lease.sample_id, None)
            self._update_gauges()

    async def _further(self, first: EpisodeGeneration, number: int) -> EpisodeGeneration:
        """Another conversation of an episode; in training it is a sample of its own."""
        lease = replace(first.lease, prefix=np.zeros(0, np.int32))
        trained = lease.kind == m.LeaseKind.TRAIN
        if trained:
            granted = await self._further_leases.ask(first.lease)
            lease = replace(lease, sample_id=granted.sample_id, grant=granted.grant)
            first.further.append(lease.sample_id)
            self._delivery.open(lease)
        rid = f"{lease.sample_id:016x}-{uuid.uuid4().hex[:12]}"
        awaits_reward = trained and first.awaits_reward
        generation = self._episodes.generation(lease, rid, first.student, awaits_reward=awaits_reward)
        generation.episode = first.lease.sample_id if trained else None
        self._live[_key(generation, number)] = generation
        return generation

    def _further_left(self, generation: EpisodeGeneration, number: int) -> None:
        self._live.pop(_key(generation, number), None)

    async def _until_ended(self, generation: Generation) -> None:
        """Generate, request after request, until the response ends, or the turn of an episode."""
        while not generation.ended:
            await self._one_request(generation)

    async def _one_request(self, generation: Generation) -> None:
        """Generate until the response ends or the request fails; failures are counted and bounded."""
        lease, longest = generation.lease, generation.max_tokens(self._settings)
        if generation.settle(longest, self._role.plan.stop_token_ids):
            await self._delivery.send_all(generation)
            return
        on_teacher = lease.kind == m.LeaseKind.EVAL_TEACHER
        generation.student = self._engines.placed(generation.student, lease.prompt_id)
        client: GenerationClient = generation.student.client
        if on_teacher:
            client = self._engines.teacher_of(lease.teacher, lease.sample_id)
        try:
            async with self._clock.timeout(None) as scope:
                generation.scope = None if on_teacher else scope
                if lease.given is not None:
                    await self._give(generation, lease.given)
                    return
                await self._admitted(generation, client, on_teacher)
                generation.streaming = not on_teacher
                await self._stream(generation, client, on_teacher)
        except TimeoutError:  # `Streams` has ended the request: another one goes on
            generation.new_request()
            await self._streams.progressed()
        except EngineError as error:
            if isinstance(error, AbortedError) and self._streams.may_abort(generation.student):
                generation.new_request()
            else:
                await self._failed(generation, client, error)
        finally:
            generation.scope = None

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
            # in the outbox before anybody else runs, so that a pause counts it
            await self._delivery.send_all(generation)

    async def _admitted(self, generation: Generation, client: GenerationClient, on_teacher: bool) -> None:
        """Wait for an open gate and a breaker that lets the request through, both at once."""
        while True:
            if not on_teacher:
                await generation.student.gate.wait()
            await self._engines.guards[client.url].admission()
            if on_teacher or generation.student.gate.is_set():
                return

    async def _stream(self, generation: Generation, client: GenerationClient, on_teacher: bool) -> None:
        """One request, to the end of its stream."""
        request = generation.sampling(self._settings, self._role.plan.stop_token_ids)
        key, rid = "" if on_teacher else generation.cache_key(self._keeps_cache), generation.rid
        answers = None if on_teacher else self._pacing.of(client.url)
        began = self._clock.now()
        if answers is not None:
            answers.asked(rid, began)
        try:
            async with aclosing(client.stream(rid, generation.input_ids(), request, key)) as stream:
                async for delta in stream:
                    if answers is not None:
                        answers.answered(rid, self._clock.now(), len(delta.token_ids))
                    await self._take(generation, delta, on_teacher)
                    self._engines.guards[client.url].succeeded()
                    if generation.ended and delta.finish is None:  # behind a text that ends a turn
                        break
            if not generation.ended:
                raise EngineError(f"{client.url}: the stream ended without a finish reason")
        finally:
            if answers is not None:
                answers.ended(rid)
            generation.streaming = False
            self._trace_request(generation, self._clock.now() - began)
            await self._streams.progressed()

    def _trace_request(self, generation: Generation, seconds: float) -> None:
        """A request to an engine has ended."""
        lease, made = generation.lease, {"tokens": generation.received, "version": generation.student.version}
        if lease.kind == m.LeaseKind.TRAIN:
            self._role.trace.span("generate", "generate", seconds, sample=lease.sample_id, **made)
        else:
            self._role.trace.span("evaluate", "evaluate", seconds, **made)

    async def _take(self, generation: Generation, delta: Delta, on_teacher: bool) -> None:
        new_tokens = generation.take(delta, on_teacher, self._role.plan.stop_token_ids)
        if generation.lease.kind == m.LeaseKind.TRAIN:
            self._role.count("tokens", new_tokens)
            self._metrics["opd_rollout_tokens_total"].inc(new_tokens)
            await self._delivery.send_due(generation, self._settings.chunk_tokens)
        await self._streams.progressed()
        if delta.aborted:
            raise AbortedError("the engine aborted the request")

    async def _failed(self, generation: Generation, client: GenerationClient, error: EngineError) -> None:
        guard = self._engines.guards[client.url]
        on_teacher = generation.lease.kind == m.LeaseKind.EVAL_TEACHER
        gate_open = on_teacher or generation.student.gate.is_set()
        if error.fault is EngineFault.SILENT and not gate_open:
            generation.new_request()  # paused engines say nothing
            return
        log.warning("sample %d: %s", generation.lease.sample_id, error)
        self._role.count("engine_errors")
        self._metrics["opd_rollout_engine_errors_total"].labels(error.fault.value).inc()
        guard.failed(error)
        generation.failures.count(error.fault)
        # an engine that is being restarted does not count against the request: its gate is closed
        hopeless = generation.failures.hopeless(self._settings.request_retries)
        if gate_open and (hopeless or guard.failing_s > self._outage_s):
            text = f"sample {generation.lease.sample_id}: {client.url} fails again and again, last: {error}"
            await self._role.control.send(m.Failure(self._role.name, text))
            await asyncio.Event().wait()  # the run ends now; this lease has nothing left to do
        generation.new_request()
        await self._clock.sleep(backoff_s(max(generation.failures.counted, 1), self._clock.random))

    # --- pausing -----------------------------------------------------------------------------------------------------

    async def _pause(self, request: int) -> None:
        """Stop the engines and deliver every token made so far; then say which tokens exist."""
        if self._paused_at is None:
            self._paused_at = self._clock.now()
        self._pacing.paused = True
        for student in self._engines.students:
            student.gate.clear()
        up = [student for student in self._engines.students if not student.down]
        results = await asyncio.gather(*(self._streams.stop(student) for student in up))
        emitted = {rid: count for counts in results for rid, count in counts.items()}
        await self._streams.all_arrived(emitted)
        for student in self._engines.students:
            student.listed = True
        for generation in list(self._live.values()):
            await self._delivery.send_all(generation)
        owed = self._delivery.owed()
        await self._role.control.send(m.Paused(request, owed.sample_ids, owed.attempts, owed.ends))
        self._update_gauges()

    async def _resume(self, version: int) -> None:
        for student in self._engines.students:
            student.version = version
            student.listed = False
            if student.down and student.slow:
                continue  # others do its work; asked, a host that is gone would hold everybody up
            student.down = False
            try:
                await student.client.resume()
            except EngineError as error:
                log.warning("continue: %s; waiting for its restart", error)
                student.lost()
                continue
            self._engines.guards[student.client.url].reset()
            student.gate.set()
        self._pacing.resume()
        if self._paused_at is not None:
            blocked = self._clock.now() - self._paused_at
            self._metrics["opd_rollout_blocked_seconds_total"].inc(blocked)
            self._role.trace.span("stopped", f"until weights {version}", blocked)
            self._paused_at = None
        self._update_gauges()

    def _engine_down(self, url: str) -> None:
        for student in self._engines.students:
            if url in student.urls:
                student.lost()

    def _engine_slow(self, message: m.EngineSlow) -> None:
        student = self._engines.slow(message.url, message.slow)
        if student is not None and self._engines.placed(student, 0) is not student:
            self._streams.move(student)

    async def _reset(self, request: int) -> None:
        """Forget every sample: the run goes back to a checkpoint."""
        for student in self._engines.students:
            student.gate.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=PAUSE_DEADLINE_S)
        self._delivery.forget()
        self._further_leases.forget()
        await self._role.control.send(m.ResetDone(self._role.name, request))

    def _update_gauges(self) -> None:
        """Bring idle time and gauges up to date."""
        running = self._streams.running
        self._idle.set_busy(running > 0)
        previous = self._role.counters.get("idle_s", 0.0)
        self._role.counters["idle_s"] = self._idle.idle_s
        self._metrics["opd_rollout_idle_seconds_total"].inc(self._idle.idle_s - previous)
        self._metrics["opd_rollout_running_requests"].set(running)


def _key(generation: EpisodeGeneration, number: int) -> int:
    """Where a further conversation stands among what is generated: its sample, or, in an evaluation, what no sample has
    for an id."""
    sample_id = generation.lease.sample_id
    return sample_id if generation.episode is not None else -1 - sample_id * (MAX_FURTHER + 1) - number


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
