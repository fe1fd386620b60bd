"""A run of the scheduling state machines on a virtual clock, driven by bytes: each pair is one event and its argument.

    LeaseBook -> Generation, Outbox -> wires -> TokenBudgetBatcher -> scored -> Assembler, policy -> learner
         ^                                                                            |
         +------------- weight barrier, acknowledgements, reclaims, checkpoints <-----+

Chunks are delayed, reordered, duplicated and lost; actors, teachers and the intake die. Only the sockets, the engines
and the dispatcher's glue are played; the glue follows `opd_async.run.dispatcher`, `lead` and `barrier` line by line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from staleness_intake import SimIntake
from staleness_oracle import BrokenInvariant, Oracle
from staleness_parts import SimActor, SimTeacher

from opd_async.config.topology import TrainOn
from opd_async.scheduling import frontier
from opd_async.scheduling.admission import (
    Admission,
    DeadlineAdmission,
    FilledAdmission,
    SampleAdmission,
)
from opd_async.scheduling.filled_samples import FilledSamples
from opd_async.scheduling.filled_steps import FilledSteps
from opd_async.scheduling.further import is_further
from opd_async.scheduling.leases import LeaseBook, PromptOrder
from opd_async.scheduling.step_policy import DeadlineCuts, StepPolicy, WholeSamples
from opd_async.transport import messages as m
from opd_async.transport.owed import OwedSample

RESEND_AFTER = 40
ATTEMPTS_PER_RECOVERY = 1000
MAX_ROUNDS = 600


class Deadlock(BrokenInvariant):
    """Nothing moves any more although every part is healthy."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Sizes of a simulated run."""

    max_staleness: int | None
    train_on: TrainOn = TrainOn.TOKENS
    slots: int = 4
    tokens_per_step: int = 8
    samples_per_step: int = 2
    chunk_tokens: int = 3
    batch_tokens: int = 5
    actors: int = 2
    teachers: int = 2
    max_length: int = 21
    seed: int = 0
    filled: bool = False
    spans: bool = False
    further: bool = False
    """Episodes begin samples beside their own."""

    def admission(self) -> Admission:
        """The rule of admission of these sizes."""
        if self.train_on is TrainOn.SAMPLES:
            return SampleAdmission(self.samples_per_step, self.max_staleness or 0)
        if self.filled:
            return FilledAdmission(self.tokens_per_step, self.max_staleness)
        return DeadlineAdmission(self.tokens_per_step, self.max_staleness or 0)

    def policy(self) -> StepPolicy:
        """The policy of these sizes."""
        if self.train_on is TrainOn.SAMPLES:
            return FilledSamples(self.samples_per_step, 1) if self.filled else WholeSamples(self.samples_per_step)
        if self.filled:
            return FilledSteps(self.tokens_per_step, self.max_staleness)
        return DeadlineCuts(self.tokens_per_step, self.max_staleness or 0)


class Simulation:
    """One run. `events` names what a schedule can make happen; frequent ones are listed more than once."""

    def __init__(self, setup: Setup, policy: StepPolicy | None = None) -> None:
        self.setup = setup
        self.oracle = Oracle(setup.max_staleness, setup.max_length, setup.seed, spans=setup.spans)
        self.now = 0
        self.leased = 0
        self._policy = policy or setup.policy()
        self._order = PromptOrder(5, 1, 0, True)
        wires = range(setup.teachers)
        self._actors = [SimActor(i, [deque() for _ in wires]) for i in range(setup.actors)]
        self._teachers = [SimTeacher(i, setup.batch_tokens) for i in wires]
        self._scored: list[m.ScoredChunk] = []
        self._done: deque[m.LeaseDone | m.FurtherUnused] = deque()
        self._wanted: deque[tuple[int, int, int]] = deque()
        """(actor, sample, attempt) of each further sample that is asked for."""
        self.begun = 0
        """Further samples."""
        self.oracle.whole_groups = setup.train_on is TrainOn.SAMPLES
        self._begin(frontier.empty(0), 0)
        often: list[Callable[[int], None]] = [self.generate, self.carry, self.score, self.deliver, self.plan]
        seldom = [self.lease, self.acknowledge, self.to_intake, self.to_coordinator, self.to_actor, self.train]
        rare = [self.kill_actor, self.start_actor, self.restart_teacher, self.duplicate, self.lose, self.tick]
        seldom += [self.ask] if setup.further else []
        self.events = [lambda _: None, *often * 8, *seldom * 8, *rare, self.save, self.save, self.restart_intake]

    def _begin(self, state: m.Frontier, floor: int) -> None:
        """Everything that starts anew from a checkpoint."""
        self._floor = floor
        self._wanted.clear()
        self._intake = SimIntake(state, floor, self._policy, self.oracle)
        self._book = LeaseBook(state, self._order, self.setup.admission(), self.setup.slots, floor)
        self._training: tuple[int, bool] | None = None
        self._started: int | None = None
        self._save_next = False
        self._owed: list[OwedSample] | None = None
        self._next_owed: list[OwedSample] = []
        self._open(state.version)

    def run(self, schedule: bytes) -> None:
        """Let the schedule happen."""
        for kind, argument in zip(schedule[::2], schedule[1::2], strict=False):
            self.now += 1
            self.events[kind % len(self.events)](argument)

    # --- rollout and teachers ----------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> m.Frontier:
        """The newest one."""
        return self._intake.checkpoint

    def _up(self) -> list[SimActor]:
        return [actor for actor in self._actors if actor.up]

    def lease(self, argument: int) -> None:
        """The dispatcher leases all that admission lets it."""
        actors = self._up()
        for turn in range(self.setup.slots if actors else 0):
            actor = actors[(argument + turn) % len(actors)]
            spec = self._book.lease(str(actor.index), self.version)
            if spec is None:
                return
            self.leased = max(self.leased, spec.sample_id + 1)
            actor.start(spec, self._book.route(spec, range(self.setup.teachers)), self.oracle)

    def generate(self, argument: int) -> None:
        """An engine makes up to four tokens of one response."""
        if actors := self._up():
            self._generate(actors[argument % len(actors)], argument >> 1, 1 + (argument >> 6))

    def _generate(self, actor: SimActor, pick: int, tokens: int) -> None:
        if self._owed is None or actor.waits_for_a_tool(self.oracle, pick):
            done = actor.generate(self.oracle, pick, tokens, self.setup.chunk_tokens, self.now)
            if done is not None:
                self._done.append(done)

    def ask(self, argument: int) -> None:
        """An episode wants another sample."""
        actor = self._actors[argument % len(self._actors)]
        if actor.up and (episode := actor.episode(argument >> 2)) is not None:
            self._wanted.append((actor.index, *episode))

    def carry(self, argument: int) -> None:
        """A chunk reaches its teacher."""
        wires = [(t, wire) for actor in self._actors for t, wire in enumerate(actor.wires) if wire]
        if wires:
            teacher, wire = wires[argument % len(wires)]
            self._scored += self._teachers[teacher].receive(wire.popleft(), self.now)

    def score(self, argument: int) -> None:
        """A teacher engine finishes a batch, and a teacher actor lets one go."""
        teacher = self._teachers[argument % len(self._teachers)]
        self._scored.extend(teacher.finish(argument >> 1))
        teacher.take(self.now)

    def kill_actor(self, argument: int) -> None:
        """A rollout actor dies; the dispatcher asks the intake what it holds of its samples."""
        actor = self._actors[argument % len(self._actors)]
        if not actor.up or argument < 128:
            return
        actor.up = False
        actor.forget()
        self._wanted = deque(one for one in self._wanted if one[0] != actor.index)
        if argument & 4:
            for wire in actor.wires:
                wire.clear()
        held = [(spec.sample_id, spec.attempt) for spec in self._book.held_by(str(actor.index))]
        self._intake.inbox.append(("reclaim", held))

    def start_actor(self, argument: int) -> None:
        """A dead actor is back."""
        actor = self._actors[argument % len(self._actors)]
        actor.up = True
        actor.student.version = self.version

    def restart_teacher(self, argument: int) -> None:
        """A teacher actor loses what it held; the rollout actors are told."""
        teacher = self._teachers[argument % len(self._teachers)]
        teacher.forget()
        for actor in self._actors:
            if argument & 2:
                actor.wires[teacher.index].clear()
            if actor.up:
                actor.control.append(m.TeacherRestarted(teacher.index))

    def tick(self, argument: int) -> None:
        """Time passes; what nobody acknowledged is sent again."""
        self.now += argument
        for actor in self._up():
            actor.send_again(actor.outbox.overdue(self.now, RESEND_AFTER))

    # --- the network to the intake -----------------------------------------------------------------------------------

    def deliver(self, argument: int) -> None:
        """Any scored chunk under way arrives."""
        if self._scored:
            self._intake.receive(self._scored.pop(argument % len(self._scored)))

    def duplicate(self, argument: int) -> None:
        """Any scored chunk under way arrives and is still under way."""
        if self._scored:
            self._intake.receive(self._scored[argument % len(self._scored)])

    def lose(self, argument: int) -> None:
        """Any scored chunk under way is lost."""
        if self._scored:
            self._scored.pop(argument % len(self._scored))

    # --- intake ------------------------------------------------------------------------------------------------------

    def plan(self, _: int = 0) -> None:
        """The intake takes a step, or a part of one, if it can; the learner begins to train it."""
        found = self._intake.plan()
        if found is not None:
            self._training = found

    def acknowledge(self, _: int = 0) -> None:
        """The intake says what it holds."""
        self._intake.acknowledge()

    def to_intake(self, _: int = 0) -> None:
        """The intake handles one message of the dispatcher."""
        self._intake.handle()

    # --- dispatcher -------------------------------------------------------------------------------------------------

    def to_coordinator(self, _: int = 0) -> None:
        """The dispatcher handles one message of the intake and one of the rollout actors."""
        if self._done:
            done = self._done.popleft()
            if isinstance(done, m.FurtherUnused):
                self._book.unused(done.sample_id, done.attempt)
            else:
                self._book.ended(done.sample_id, done.attempt, done.response_tokens - done.given_tokens)
        if self._wanted:
            index, sample_id, attempt = self._wanted.popleft()
            if (spec := self._book.further(sample_id, attempt, str(index))) is not None:
                self.begun += 1
                self._actors[index].control.append(spec)
        match self._intake.outbox.popleft() if self._intake.outbox else None:
            case ("acks", next_step, ready, (taken, idle, hold), rows):
                self._pass_on(rows)
                self._book.admission.ready(next_step, ready)
                if next_step == self.version:
                    self._book.admission.opened(taken, idle)
                if hold == self.version:
                    self._book.admission.held()
                    self._close()
            case ("drain", version):
                self._intake.inbox.append(("drained", version, self._close()))
            case ("started", version, rows, closes, taken):
                for row in rows:
                    self._book.trained(row.sample_id, row.end, row.complete, row.given)
                self._book.admission.opened(taken, False)
                if closes:
                    self._book.admission.closed(taken, (self.now % 5) / 50)
                    self._started = version
                    self._next_step()
            case ("reclaimed", results):
                for sample_id, attempt, prefix, complete in results:
                    self._book.give_back(sample_id, attempt, prefix, complete)

    def _pass_on(self, rows: list[tuple[int, int, int, int]]) -> None:
        for actor in self._up():
            mine = np.array([row for row in rows if row[2] == actor.index], np.int64).reshape(-1, 4)
            attempts, actors, ends = (mine[:, i].astype(np.int32) for i in (1, 2, 3))
            actor.control.append(
                m.Acks(
                    next_step=0,
                    ready_tokens=0,
                    taken_tokens=0,
                    idle=False,
                    hold=None,
                    sample_ids=mine[:, 0],
                    attempts=attempts,
                    actors=actors,
                    ends=ends,
                )
            )

    def to_actor(self, argument: int) -> None:
        """A rollout actor handles one message of the dispatcher."""
        actor = self._actors[argument % len(self._actors)]
        if actor.up and actor.control:
            self._handle(actor)

    def _handle(self, actor: SimActor) -> None:
        if (back := actor.handle(actor.control.popleft(), self.oracle, self.now)) is not None:
            self._done.append(back)

    def _close(self) -> list[tuple[int, int, int]]:
        if self._owed is None:
            self._owed = [row for actor in self._up() for row in actor.pause(self.now)]
        return self._owed

    def _open(self, version: int) -> None:
        self.version, self._owed = version, None
        for actor in self._actors:
            actor.student.version = version

    def train(self, _: int = 0) -> None:
        """The learner ends a part of its step; after the last one the engines get the new weights."""
        if self._training is not None:
            (version, closes), self._training = self._training, None
            self._intake.busy = False
            if not closes:
                return
            version += 1
            while self._intake.outbox:  # the learner's answer is younger than what the intake said before the step
                self.to_coordinator()
            self._next_owed = self._close()
            self._open(version)
            self._next_step()

    def save(self, _: int = 0) -> None:
        """The next step is followed by a checkpoint."""
        self._save_next = True

    def _next_step(self) -> None:
        """Once the step is accounted for and the weights are out, the next one may be planned."""
        if self._started is None or self.version != self._started + 1:
            return
        self._started = None
        if self._save_next:
            self._intake.inbox.append(("save", self.version))
            self._save_next = False
        self._intake.inbox.append(("version", self.version, self._next_owed))

    def restart_intake(self, argument: int) -> None:
        """Now and then, intake and learner go back to the checkpoint; at times everything is started anew with them."""
        if argument < 240:
            return
        cold = argument % 2 == 0
        for actor in self._actors:
            actor.forget()
            if cold:
                actor.up = True
                for wire in actor.wires:
                    wire.clear()
        for teacher in self._teachers:
            teacher.forget()
        if cold:
            self._scored.clear()
            self._done.clear()
        self._begin(self._intake.checkpoint, 0 if cold else self._floor + ATTEMPTS_PER_RECOVERY)
        self.oracle.forget(self.version)

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """From here on nothing fails: three more steps, then every sample that was begun is trained to its end."""
        self._until(self.version + 3)
        self.oracle.limit = limit = self.leased
        if isinstance(self._policy, DeadlineCuts | FilledSteps):
            self._policy.budget = 1
        self._until(None, limit)
        self.oracle.check_all(limit)

    def _until(self, version: int | None, limit: int = 0) -> None:
        for turn in range(MAX_ROUNDS):
            if self.version >= version if version is not None else self._completed(limit):
                return
            self._round(turn)
        raise Deadlock(self._state())

    def _completed(self, limit: int) -> bool:
        here = [*self._intake.assembler.samples]
        here += [spec.sample_id for actor in self._actors for spec in self._book.held_by(str(actor.index))]
        if any(is_further(sample_id) for sample_id in here):
            return False
        return all(sample_id in self._intake.assembler.completed for sample_id in range(limit))

    def _round(self, turn: int) -> None:
        """Everything that can happen without a failure, once."""
        for index, actor in enumerate(self._actors):
            if not actor.up:
                self.start_actor(index)
        self.lease(turn)
        for actor in self._actors:
            for pick in range(len(actor.live)):
                self._generate(actor, pick, 2)
            for _ in range(sum(map(len, actor.wires))):
                self.carry(0)
            while actor.control:
                self._handle(actor)
        for argument in range(2 * len(self._teachers)):
            self.now += 3
            self.score(argument)
        while self._scored:
            self.deliver(0)
        for step in (self.to_intake, self.plan, self.acknowledge, self.to_coordinator, self.to_coordinator, self.train):
            step(turn)
        self.tick(1)

    def _state(self) -> str:
        intake, book = self._intake, self._book
        samples = [
            (s.sample_id, s.attempt, s.trained_end, s.scored_end, s.finish) for s in intake.assembler.samples.values()
        ]
        return (
            f"no end at version {self.version}: intake plans {intake.version}, learner trains {self._training}, "
            f"owed {intake.assembler.owed()}, generating {book.generating}, waiting {book.waiting_tokens}, "
            f"gate {'closed' if self._owed is not None else 'open'}, inboxes {len(intake.inbox)} and "
            f"{len(intake.outbox)}, unacknowledged {[a.outbox.unacknowledged for a in self._actors]}, samples {samples}"
        )


def play(setup: Setup, schedule: bytes, policy: StepPolicy | None = None) -> Simulation:
    """Run a schedule and then to the end; raises `BrokenInvariant`."""
    simulation = Simulation(setup, policy)
    simulation.run(schedule)
    simulation.finish()
    return simulation
