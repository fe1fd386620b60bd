"""One schedule under one workload: the project's state machines on a virtual clock.

    LeaseBook -> student engines -> Chunk -> route -> teacher engines -> ScoredChunk -> Assembler, StepPolicy
         ^                                                                                        |
         +------------ weight update (pause, flush, load, mark, resume) <--- learner <------------+

Admission, routing, batching, assembly, marks and planning are the real ones; engines and learner are their costs. What
is left out: the network between actors (a millisecond a hop), failures, and the order of events within a millisecond.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from opd_async.bench.sim.clock import Clock
from opd_async.bench.sim.figures import Account, Marks, Row
from opd_async.bench.sim.open_step import OpenStep
from opd_async.bench.sim.rules import Rule, Scoring
from opd_async.bench.sim.student import Generation, StudentEngine
from opd_async.bench.sim.teacher import PrefixCache, TeacherEngine
from opd_async.bench.sim.tools import Call, Tools
from opd_async.config.topology import TrainOn
from opd_async.forecast.lengths import LengthStream, typical
from opd_async.forecast.workload import Workload
from opd_async.scheduling import frontier
from opd_async.scheduling.assembly import Assembler
from opd_async.scheduling.cache_share import CutPoints
from opd_async.scheduling.leases import LeaseBook, PromptOrder
from opd_async.scheduling.score_batches import TokenBudgetBatcher
from opd_async.scheduling.step_policy import DeadlineCuts, Round
from opd_async.transport.messages import Chunk, ScoredChunk
from opd_async.transport.owed import OwedSample

TURN_S = 0.05
"""How often the intake gives an account; it plans and asks for a hold then."""
ACTOR = "rollout-0"
LONGEST = 1 << 18
IDS = np.zeros(LONGEST, np.int32)
LOGPROBS = np.full(LONGEST, -1.0, np.float32)
SHARED_FIELDS = tuple({f.name for f in fields(Chunk)} & {f.name for f in fields(ScoredChunk)})


class Simulation:
    """A run from its first lease on. `run` returns its figures."""

    def __init__(
        self, workload: Workload, rule: Rule, scoring: Scoring, seed: int = 0, tools: Tools | None = None
    ) -> None:
        """`tools`: responses are episodes that call them."""
        self._work, self._rule, self._scoring = workload, rule, scoring
        self._tools, self._seed = tools, seed
        self._away: dict[int, Generation] = {}
        """Episodes that wait for tools."""
        self._clock = Clock()
        self._account = Account(workload=workload)
        self._lengths = LengthStream(workload.lengths, seed, workload.group_size, workload.correlation)
        sizes = workload.samples_per_step, workload.tokens_per_step, rule.staleness
        order = PromptOrder(1 << 20, workload.group_size, seed, shuffle=False)
        longest = int(typical(workload.lengths).max())
        self._book = LeaseBook(frontier.empty(0), order, rule.admission(*sizes), workload.slots, longest=longest)
        self._policy = rule.policy(*sizes)
        self._assembler = Assembler()
        self._assembler.start_at(0)
        self._engines = [self._engine() for _ in range(workload.engines)]
        self._teachers = [self._teacher() for _ in range(workload.teachers)]
        self._kept: dict[int, list[Chunk]] = {}
        self._unscored: dict[int, int] = {}
        self._version = 0
        self._routes: dict[int, int] = {}
        self._leased = 0
        self._ended = 0
        self._may_plan = True
        self._training: int | None = None
        self._step = OpenStep()
        self._update_due = False
        self._drained = False
        self._turn_due = False
        self._ended_at: dict[int, float] = {}
        self._began: dict[int, int] = {}
        """Weights under which each response began that is not trained to its end."""

    def _engine(self) -> StudentEngine:
        work = self._work
        chunk = work.chunk_tokens if self._scoring is Scoring.STREAMED else LONGEST
        engine = StudentEngine(self._clock, work.decode, work.prefill, work.prompt_tokens, chunk)
        engine.emit = self._emit
        engine.away = self._call
        return engine

    def _teacher(self) -> TeacherEngine:
        work = self._work
        deadline = self._rule.staleness if self._rule.train_on is TrainOn.TOKENS else None
        batcher = TokenBudgetBatcher(work.batch_tokens, work.max_wait_s)
        points = CutPoints(work.chunk_tokens, deadline)
        return TeacherEngine(
            clock=self._clock,
            batcher=batcher,
            points=points,
            cost=work.score,
            cache=PrefixCache(work.cache_tokens),
            deliver=self._scored,
        )

    def run(self, warmup: int, steps: int) -> Row:
        """Figures of `steps` optimizer steps after the first `warmup`."""
        self._lease()
        self._clock.run(lambda: self._version >= warmup)
        first = self._marks()
        self._account.begin()
        self._clock.run(lambda: self._version >= warmup + steps)
        name = (self._rule.name, self._scoring.value, self._rule.staleness)
        return self._account.row(name, first, self._marks(), steps)

    def _marks(self) -> Marks:
        account, teachers = self._account, self._teachers
        return Marks(
            now=self._clock.now,
            trained=account.trained,
            forwarded=account.forwarded,
            rollout_s=sum(engine.busy_s for engine in self._engines),
            teacher_s=sum(teacher.busy_s for teacher in teachers),
            learner_s=account.learner_s,
            scored=sum(teacher.new for teacher in teachers),
            computed=sum(teacher.computed for teacher in teachers),
            blocked_s=account.blocked_s,
        )

    # --- rollout -----------------------------------------------------------------------------------------------------

    def _lease(self) -> None:
        """Start whatever admission lets; on the engine with the fewest responses."""
        if self._engines[0].paused:
            return
        while self._batch_may_begin() and (spec := self._book.lease(ACTOR, self._version)) is not None:
            self._leased += 1
            self._began[spec.sample_id] = self._version
            self._routes[spec.sample_id] = self._book.route(spec, range(len(self._teachers)))
            length = self._lengths[spec.sample_id]
            calls = [] if self._tools is None else self._tools.of(self._seed, spec.sample_id, length)
            generation = Generation(sample_id=spec.sample_id, prompt_id=spec.prompt_index, length=length, calls=calls)
            self._start(generation)

    def _start(self, generation: Generation) -> None:
        min(self._engines, key=lambda one: one.load).start(generation)

    def _call(self, generation: Generation, call: Call) -> None:
        """A turn has ended, and a tool begins."""
        assert self._tools is not None
        self._away[generation.sample_id] = generation
        if (seconds := self._tools.away_after_s(call)) is not None:
            self._clock.after(seconds, lambda: self._waits(generation, True))
        self._clock.after(call.seconds, lambda: self._waits(generation, False))

    def _waits(self, generation: Generation, away: bool) -> None:
        """An episode has waited for so long that its slot is free, or its tool has answered."""
        if self._away.get(generation.sample_id) is not generation:  # thrown away for its age
            return
        self._book.away(generation.sample_id, 0, away)
        if away:
            self._lease()
            return
        del self._away[generation.sample_id]
        self._start(generation)

    def _quiet(self) -> bool:
        """Whether no response is under way."""
        return self._book.generating == 0 and not self._away

    def _batch_may_begin(self) -> bool:
        """Behind a barrier, a batch is leased as a whole or not at all."""
        if not self._rule.barrier or self._quiet():
            return not (self._rule.barrier and self._update_due)
        return bool(self._leased % self._work.samples_per_step)

    def _emit(self, generation: Generation, end: int, ended: bool) -> None:
        """A chunk leaves its engine."""
        start, sample_id = generation.flushed, generation.sample_id
        chunk = Chunk(
            sample_id=sample_id,
            attempt=0,
            actor=0,
            prompt_id=generation.prompt_id,
            prompt_tokens=self._work.prompt_tokens,
            start=start,
            weight_version=self._version,
            finish="stop" if ended else None,
            label="",
            made_at=self._clock.now,
            token_ids=IDS[: end - start],
            behaviour_logprobs=LOGPROBS[: end - start],
            context=IDS[: self._work.prompt_tokens] if start == 0 else None,
        )
        self._kept.setdefault(sample_id, []).append(chunk)
        if ended:
            self._ended += 1
            self._ended_at[sample_id] = self._clock.now
            self._book.ended(sample_id, 0, end)
        if ended or self._scoring is Scoring.STREAMED or self._rule.train_on is TrainOn.TOKENS:
            self._send(sample_id)
        if ended:
            if self._update_due and self._may_update():
                self._update()
            self._lease()
            self._news()

    def _send(self, sample_id: int) -> None:
        teacher = self._teachers[self._routes[sample_id]]
        chunks = self._kept.pop(sample_id)
        self._unscored[sample_id] = chunks[-1].end
        teacher.receive(chunks)

    # --- intake ------------------------------------------------------------------------------------------------------

    def _scored(self, chunk: Chunk) -> None:
        """A scored chunk reaches the intake."""
        values = {field: getattr(chunk, field) for field in SHARED_FIELDS}
        logprobs = LOGPROBS[: len(chunk.token_ids)]
        scored = ScoredChunk(**values, teacher_id="", latency_s=0.0, teacher_logprobs=logprobs)
        self._assembler.add(scored)
        if self._unscored.get(chunk.sample_id) == chunk.end:
            del self._unscored[chunk.sample_id]
        if chunk.finish is not None and (ended := self._ended_at.pop(chunk.sample_id, None)) is not None:
            self._account.latencies.append(self._clock.now - ended)
        self._news()

    def _news(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self._clock.after(TURN_S, self._turn)

    def _turn(self) -> None:
        """Plan, tell admission, and see whether generation must stop."""
        self._turn_due = False
        if self._may_plan:
            self._plan()
        policy, step, closed = self._policy, self._step, not self._may_plan
        self._book.admission.opened(step.taken, not step.busy)
        if policy.overfull(self._assembler, self._version, None if closed else step.taken):
            self._book.admission.held()
            self._pause()
        if self._rule.stops_when_full and step.busy:
            waiting = sum(sample.finish is not None for sample in self._assembler.samples.values())
            if waiting >= self._work.samples_per_step:
                self._pause()
        if closed and isinstance(policy, DeadlineCuts):
            ready = policy.ready_tokens(self._assembler, self._version + 1)
            self._book.admission.ready(self._version + 1, ready)
        if self._rule.train_on is TrainOn.TOKENS:
            self._lease()

    def _plan(self) -> None:
        if self._step.busy:
            return
        if self._ended < (self._version + self._rule.lag + 1) * self._work.samples_per_step * self._rule.barrier:
            return
        found = self._policy.round(self._assembler, self._version, self._step.taken)
        if found.drain and not self._drained:
            self._drained = True
            self._pause()
            self._assembler.mark(self._version, self._owed())
            self._news()
        if found.samples or found.closes:
            self._train(found)

    def _train(self, part: Round) -> None:
        """The learner takes a part of its step, or all of it."""
        account, train = self._account, self._work.train
        self._may_plan = not part.closes
        self._training = self._version
        seconds, trained, forwarded = 0.0 if self._step.parts else train.floor_s, 0, 0
        for sample in part.samples:
            end, complete = sample.scored_end, sample.finish is not None
            segment = self._assembler.take(sample)
            self._book.trained(sample.sample_id, end, complete)
            if complete:
                account.completed.append(end)
                del self._began[sample.sample_id], self._routes[sample.sample_id]
            if segment is None:
                continue
            rows, tokens = segment.end - segment.start, len(segment.token_ids)
            seconds += train.segment_s(tokens, rows)
            trained += rows
            forwarded += tokens
            account.aged(self._version, segment.versions)
        self._step.add(trained, forwarded, seconds)
        self._book.admission.opened(self._step.taken, False)
        self._clock.after(seconds, lambda: self._trained(part.closes))
        self._lease()

    # --- weights -----------------------------------------------------------------------------------------------------

    def _trained(self, closes: bool) -> None:
        """The learner has ended a part; the last one ends its step."""
        step = self._step
        step.busy = False
        self._book.admission.opened(step.taken, True)
        if not closes:
            self._plan()
            self._lease()
            self._news()
            return
        self._account.stepped(step)
        self._book.admission.closed(step.taken, step.waited(self._clock.now))
        self._update_due = True
        if self._may_update():
            self._update()

    def _may_update(self) -> bool:
        return not self._rule.barrier or self._quiet()

    def _pause(self) -> None:
        for engine in self._engines:
            if not engine.paused:
                engine.pause()

    def _update(self) -> None:
        """Stop generation, load the weights, go on."""
        self._update_due = False
        self._pause()
        owed = self._owed()
        self._account.blocked_s += self._work.sync_s
        self._clock.after(self._work.sync_s, lambda: self._updated(owed))

    def _drop(self, oldest: int) -> None:
        """Throw away every response that began under weights before `oldest`."""
        for sample_id in [one for one, version in self._began.items() if version < oldest]:
            length = self._lengths[sample_id]
            running = next((engine for engine in self._engines if sample_id in engine.running), None)
            waiting = self._away.pop(sample_id, None)
            made = length if waiting is None else waiting.flushed
            self._account.lost += running.drop(sample_id) if running is not None else made
            self._account.dropped.append(length)
            self._assembler.samples.pop(sample_id, None)
            self._assembler.completed.add(sample_id)  # chunks under way come too late
            self._unscored.pop(sample_id, None)
            self._ended_at.pop(sample_id, None)
            self._kept.pop(sample_id, None)
            self._book.trained(sample_id, length, complete=True)
            del self._began[sample_id], self._routes[sample_id]

    def _owed(self) -> list[OwedSample]:
        return [OwedSample(sample_id, 0, end) for sample_id, end in self._unscored.items()]

    def _updated(self, owed: list[OwedSample]) -> None:
        assert self._training is not None
        self._version, self._training = self._training + 1, None
        self._step = OpenStep(began=self._clock.now)
        self._drained = False
        self._assembler.mark(self._version - 1, owed)
        if self._rule.drops_after is not None:
            self._drop(self._version - self._rule.drops_after)
        self._may_plan = True
        for engine in self._engines:
            engine.resume()
        for teacher in self._teachers:
            teacher.advance(self._version)
        self._lease()
        self._plan()
        self._news()
