"""All devices generate, then all score, then all train: one pool, no schedule, and the price of changing what it does.

    generate until a step's responses have ended -> switch -> score -> switch -> train -> switch -> generate ...

slime `--colocate` and verl's hybrid engine, with partial rollouts (APRIL): responses that have not ended are kept and
go on after the update, behind a prefill of what they have. The pool is as many devices as the roles have apart, each
stage that much faster; perfect scaling is assumed, which is more than colocated trainers have.
"""

from __future__ import annotations

from itertools import count

import numpy as np

from opd_async.bench.sim.clock import Clock
from opd_async.bench.sim.figures import Account, Marks, Row
from opd_async.bench.sim.open_step import OpenStep
from opd_async.bench.sim.student import Generation, StudentEngine
from opd_async.bench.sim.tools import Call, Tools
from opd_async.forecast.lengths import LengthStream
from opd_async.forecast.workload import Workload

PREFILL_SHARE = 0.1
"""Of the time to score a token: what prefilling one costs where the workload's own prefill is free."""
WHOLE = 1 << 30


class Colocated:
    """A pool of devices that changes its work three times a step, which takes `switch_s` seconds in all.

    `full`: every engine of the pool has the slots of one of the workload; else the slots of the workload are dealt out.
    """

    def __init__(
        self, workload: Workload, switch_s: float, full: bool = False, seed: int = 0, tools: Tools | None = None
    ) -> None:
        self._tools, self._seed = tools, seed
        self._work, self._switch_s = workload, switch_s
        self._clock = Clock()
        self._account = Account(workload=workload)
        self._lengths = LengthStream(workload.lengths, seed, workload.group_size, workload.correlation)
        self._pool = workload.devices.total
        engines = round(workload.engines * self._pool / workload.devices.rollout)
        self._engines = [
            StudentEngine(self._clock, workload.decode, workload.prefill, workload.prompt_tokens, WHOLE)
            for _ in range(engines)
        ]
        for engine in self._engines:
            engine.emit = self._emit
            engine.away = self._call
        self._slots = workload.slots // workload.engines * engines if full else workload.slots
        self._numbers = count()
        self._spans: dict[int, list[tuple[int, int]]] = {}
        """(weights, end) of the tokens of each response that is not trained."""
        self._ended: list[int] = []
        self._ended_at: dict[int, float] = {}
        self._version = 0
        self._teacher_s = 0.0
        self._scored = 0

    def run(self, warmup: int, steps: int) -> Row:
        """Figures of `steps` optimizer steps after the first `warmup`."""
        for _ in range(warmup):
            self._one_step()
        first = self._marks()
        self._account.begin()
        for _ in range(steps):
            self._one_step()
        name = (f"colocated_{self._switch_s:g}{'f' * (self._slots > self._work.slots)}", "whole", None)
        return self._account.row(name, first, self._marks(), steps)

    def _marks(self) -> Marks:
        account = self._account
        return Marks(
            now=self._clock.now,
            trained=account.trained,
            forwarded=account.forwarded,
            rollout_s=sum(engine.busy_s for engine in self._engines) * self._work.engines / len(self._engines),
            teacher_s=self._teacher_s * self._work.teachers,
            learner_s=account.learner_s,
            scored=self._scored,
            computed=self._scored,
            blocked_s=account.blocked_s,
        )

    def _fill(self) -> None:
        while sum(engine.load for engine in self._engines) < self._slots:
            sample_id = next(self._numbers)
            self._spans[sample_id] = []
            length = self._lengths[sample_id]
            calls = [] if self._tools is None else self._tools.of(self._seed, sample_id, length)
            self._start(Generation(sample_id=sample_id, prompt_id=sample_id, length=length, calls=calls))

    def _start(self, generation: Generation) -> None:
        min(self._engines, key=lambda one: one.load).start(generation)

    def _call(self, generation: Generation, call: Call) -> None:
        """A turn has ended: another response has its slot until the tool has answered, and no other begins then."""
        self._clock.after(call.seconds, lambda: self._start(generation))
        if len(self._ended) < self._work.samples_per_step and not self._engines[0].paused:
            self._fill()

    def _emit(self, generation: Generation, end: int, ended: bool) -> None:
        """A response ends, or the pool stops generating: so far it was made by the present weights."""
        self._spans[generation.sample_id].append((self._version, end))
        if ended:
            self._ended.append(generation.sample_id)
            self._ended_at[generation.sample_id] = self._clock.now
            if len(self._ended) < self._work.samples_per_step:
                self._fill()

    def _pass(self, seconds: float) -> None:
        until = self._clock.now + seconds
        self._clock.at(until, lambda: None)
        self._clock.run(lambda: self._clock.now >= until)

    def _one_step(self) -> None:
        """Generate until a step is full, score it, train it, take the new weights."""
        self._fill()
        self._clock.run(lambda: len(self._ended) >= self._work.samples_per_step)
        for engine in self._engines:
            engine.pause()
        batch, self._ended = self._ended[: self._work.samples_per_step], self._ended[self._work.samples_per_step :]
        score_s = self._score(batch)
        step = self._train(batch)
        running = [self._spans[one] for engine in self._engines for one in engine.running]
        kept = sum(spans[-1][1] for spans in running if spans)
        prefill_s = kept * self._work.score.token_s / self._work.teachers * PREFILL_SHARE
        seconds = self._switch_s + self._work.sync_s + prefill_s * self._work.devices.teacher / self._pool
        self._account.blocked_s += seconds
        self._pass(score_s + step.busy_s + seconds)
        self._account.stepped(step)
        self._version += 1
        for engine in self._engines:
            engine.resume()

    def _score(self, batch: list[int]) -> float:
        """Seconds in which the pool scores these responses."""
        work = self._work
        tokens = [self._spans[one][-1][1] + work.prompt_tokens for one in batch]
        self._scored += sum(tokens)
        floors = sum(tokens) / work.batch_tokens * work.score.floor_s
        seconds = (sum(work.score.tokens_s(0, one) for one in tokens) + floors) / work.teachers
        seconds *= work.devices.teacher / self._pool
        self._teacher_s += seconds
        scored_at = self._clock.now + self._switch_s / 3 + seconds
        self._account.latencies += [scored_at - self._ended_at.pop(one) for one in batch]
        return seconds

    def _train(self, batch: list[int]) -> OpenStep:
        """The step that trains these responses."""
        work, step = self._work, OpenStep(began=self._clock.now)
        seconds = work.train.floor_s
        for sample_id in batch:
            spans = self._spans.pop(sample_id)
            length, starts = spans[-1][1], [0, *(end for _, end in spans)]
            versions = np.repeat([version for version, _ in spans], np.diff(starts)).astype(np.int32)
            self._account.aged(self._version, versions)
            self._account.completed.append(length)
            seconds += work.train.segment_s(length + work.prompt_tokens, length) * work.devices.learner / self._pool
            step.taken += length
            step.forwarded += length + work.prompt_tokens
        step.busy_s = seconds
        return step
