"""The simulator's rollout and teacher actors: the real state machines in place of the real actors' sockets."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from staleness_oracle import Oracle, behaviour_of, prompt_of, teacher_of

from opd_async.actors.client.engine_client import EngineClient
from opd_async.actors.client.replies import Delta
from opd_async.actors.rollout.generation import Generation, Student
from opd_async.scheduling.leases import LeaseSpec
from opd_async.scheduling.outbox import Outbox
from opd_async.scheduling.score_batches import ScoreItem, TokenBudgetBatcher
from opd_async.transport import messages as m
from opd_async.transport.owed import OwedSample


@dataclass(slots=True)
class SimActor:
    """A rollout actor; `wires[t]` are the chunks on their way to teacher t, `control` the dispatcher's messages."""

    index: int
    wires: list[deque[m.Chunk]]
    outbox: Outbox = field(default_factory=Outbox)
    student: Student = field(default_factory=lambda: Student(client=cast(EngineClient, None), urls=()))
    live: dict[int, Generation] = field(default_factory=dict)
    control: deque[Any] = field(default_factory=deque)
    up: bool = True

    def start(self, spec: LeaseSpec, route: int, oracle: Oracle) -> None:
        """Take a lease, whose chunks go to teacher `route`."""
        prompt = prompt_of(spec.sample_id)
        kind = m.LeaseKind.TRAIN.value
        lease = m.Lease(
            sample_id=spec.sample_id,
            attempt=spec.attempt,
            prompt_id=spec.prompt_index,
            kind=kind,
            temperature=1.0,
            label="",
            prompt=prompt,
            prefix=spec.prefix,
        )
        self.outbox.open(spec.sample_id, spec.attempt, route, prompt, spec.prefix)
        given = oracle.given_before(spec.sample_id, len(spec.prefix))
        self.live[spec.sample_id] = Generation(
            lease=lease, rid="", student=self.student, given_tokens=given, episode=spec.episode
        )
        if spec.episode is not None:
            self.live[spec.episode].further.append(spec.sample_id)

    def episode(self, pick: int) -> tuple[int, int] | None:
        """(sample, attempt) of a leased response that is under way."""
        leased = [g.lease for g in self.live.values() if g.episode is None]
        return (leased[pick % len(leased)].sample_id, leased[pick % len(leased)].attempt) if leased else None

    def generate(self, oracle: Oracle, pick: int, tokens: int, chunk_tokens: int, now: int) -> m.LeaseDone | None:
        """Some new tokens of one response; tells when that ends it."""
        if not self.live:
            return None
        generation = list(self.live.values())[pick % len(self.live)]
        lease, start = generation.lease, generation.length
        if (until := oracle.given_until(lease.sample_id, start)) > start:
            return self._give(oracle, generation, until, now)
        end = min(start + tokens, oracle.length_of(lease.sample_id))
        end = next((at for at in range(start, end) if oracle.given_until(lease.sample_id, at) > at), end)
        version = self.student.version
        ids = np.array([oracle.make(lease.sample_id, at, version) for at in range(start, end)], np.int32)
        finish = m.Finish.STOP if end == oracle.length_of(lease.sample_id) else None
        generation.take(Delta(ids, behaviour_of(ids), str(version), finish, False), False, ())
        self.flush(generation, chunk_tokens, now)
        if finish is None:
            return None
        del self.live[lease.sample_id]
        return generation.done()

    def waits_for_a_tool(self, oracle: Oracle, pick: int) -> bool:
        """Whether the next tokens of a response are given ones: they come also while generation stands still."""
        if not self.live:
            return False
        generation = list(self.live.values())[pick % len(self.live)]
        return oracle.given_until(generation.lease.sample_id, generation.length) > generation.length

    def _give(self, oracle: Oracle, generation: Generation, until: int, now: int) -> m.LeaseDone | None:
        """A tool answers; where nothing follows its answer, the response ends behind it."""
        lease, version = generation.lease, self.student.version
        generation.give(
            np.array([oracle.make(lease.sample_id, at, version) for at in range(generation.length, until)], np.int32)
        )
        self.flush(generation, 1, now)
        if until < oracle.length_of(lease.sample_id):
            return None
        nothing = Delta(np.zeros(0, np.int32), np.zeros(0, np.float32), str(version), m.Finish.STOP, False)
        generation.take(nothing, False, ())
        self.flush(generation, 1, now)
        del self.live[lease.sample_id]
        return generation.done()

    def flush(self, generation: Generation, chunk_tokens: int, now: int) -> None:
        """Send the chunks that are due."""
        for chunk in generation.due_chunks(chunk_tokens, self.index):
            outgoing = self.outbox.add(chunk, now)
            self.wires[self.outbox.route_of(chunk.sample_id)].append(outgoing)

    def send_again(self, pairs: list[tuple[int, m.Chunk]]) -> None:
        """Chunks that the outbox wants to see sent again."""
        for teacher, chunk in pairs:
            self.wires[teacher].append(chunk)

    def pause(self, now: int) -> list[OwedSample]:
        """Flush everything; returns the tokens that exist."""
        for generation in self.live.values():
            self.flush(generation, 1, now)
        return self.outbox.owed()

    def handle(self, message: Any, oracle: Oracle, now: int) -> m.FurtherUnused | None:
        """One message of the dispatcher; returns what it is told of a further sample that comes too late."""
        if isinstance(message, m.Acks):
            for sample_id, attempt, end in zip(message.sample_ids, message.attempts, message.ends, strict=True):
                self.outbox.acknowledge(int(sample_id), int(attempt), int(end), now)
        elif isinstance(message, m.TeacherRestarted):
            self.send_again(self.outbox.teacher_restarted(message.index, now))
        elif message.episode in self.live:
            self.start(message, self.outbox.route_of(message.episode), oracle)
        else:
            return m.FurtherUnused(message.sample_id, message.attempt)
        return None

    def forget(self) -> None:
        """Lose everything: a death, or a reset."""
        self.live.clear()
        self.outbox.clear()
        self.control.clear()


class SimTeacher:
    """A teacher actor: chunks in, scored chunks out."""

    def __init__(self, index: int, batch_tokens: int) -> None:
        self.index = index
        self._batch_tokens = batch_tokens
        self.forget()

    def forget(self) -> None:
        """A restart: it holds nothing."""
        self.batcher = TokenBudgetBatcher(self._batch_tokens, 5.0)
        self.in_flight: list[list[tuple[ScoreItem, NDArray[np.int32] | None]]] = []
        self._ids: dict[int, tuple[int, NDArray[np.int32]]] = {}

    def receive(self, chunk: m.Chunk, now: int) -> list[m.ScoredChunk]:
        """Queue a chunk if its beginning is known; returns what needs no score."""
        known = self._ids.get(chunk.sample_id)
        if chunk.context is not None:
            self.batcher.drop(chunk.sample_id)
            prefix = chunk.context
        elif known is not None and known[0] == chunk.attempt and len(known[1]) == chunk.prompt_tokens + chunk.start:
            prefix = known[1]
        else:
            return []
        self._ids[chunk.sample_id] = (chunk.attempt, np.concatenate([prefix, chunk.token_ids]))
        if not chunk.sampled:
            return [chunk.scored(f"teacher-{self.index}", 0.0, np.zeros(0, np.float32))]
        self.batcher.add(chunk, now)
        return []

    def take(self, now: int) -> None:
        """Let a batch go to the engine if one may."""
        if batch := self.batcher.take(now):
            self.in_flight.append([(item, self._ids.get(item.sample_id, (0, None))[1]) for item in batch])

    def finish(self, pick: int) -> list[m.ScoredChunk]:
        """The engine answers one of the batches under way."""
        if not self.in_flight:
            return []
        batch = self.in_flight.pop(pick % len(self.in_flight))
        # without ids, the sample came again and had ended before
        scored = [self._score(chunk, ids) for item, ids in batch if ids is not None for chunk in item.chunks]
        self.batcher.done([item.sample_id for item, _ in batch])
        for chunk in scored:
            if chunk.finish is not None:
                self._ids.pop(chunk.sample_id, None)
        return scored

    def _score(self, chunk: m.Chunk, ids: NDArray[np.int32]) -> m.ScoredChunk:
        first = chunk.prompt_tokens + chunk.start
        logprobs = teacher_of(ids[first - 1 : first - 1 + len(chunk.token_ids)], chunk.token_ids)
        return chunk.scored(f"teacher-{self.index}", 0.0, logprobs)
