"""The simulator's intake: the real assembler and policy, with the glue of `actors.intake` line by line."""

from __future__ import annotations

from collections import deque
from typing import Any

from staleness_oracle import Oracle, Row

from opd_async.scheduling import frontier
from opd_async.scheduling.assembly import Sample, Verdict
from opd_async.scheduling.step_policy import StepPolicy
from opd_async.transport import messages as m


class SimIntake:
    """One incarnation; `inbox` comes from the dispatcher, `outbox` goes to it."""

    def __init__(self, state: m.Frontier, floor: int, policy: StepPolicy, oracle: Oracle) -> None:
        self.assembler = frontier.restore(state, floor)
        self.checkpoint = state
        self.version: int | None = None
        """What may be planned now."""
        self._steps = state.version
        self.inbox: deque[tuple[Any, ...]] = deque([("version", state.version, [])])
        self.outbox: deque[tuple[Any, ...]] = deque()
        self._policy = policy
        self._oracle = oracle
        self._drain_asked = False
        self._taken = 0
        self.busy = False
        """The learner trains a part of the open step."""
        self._touched: set[int] = set()
        self._finished: dict[int, tuple[int, int, int]] = {}

    def receive(self, chunk: m.ScoredChunk) -> None:
        """A scored chunk arrives."""
        if self.assembler.add(chunk, self._oldest()) in (Verdict.ACCEPTED, Verdict.DUPLICATE):
            self._touched.add(chunk.sample_id)

    def _oldest(self) -> int:
        bound = getattr(self._policy, "max_staleness", None)
        return 0 if bound is None else max(self._steps - bound - 1, 0)

    def plan(self) -> tuple[int, bool] | None:
        """Take a part of a step if there is one, or ask for a drain; returns what is trained: (version, last part)."""
        version = self.version
        if version is None or self.busy:
            return None
        found = self._policy.round(self.assembler, version, self._taken)
        if found.drain and not self._drain_asked:
            self._drain_asked = True
            self.outbox.append(("drain", version))
        if not found.samples and not found.closes:
            return None
        rows = [self._take(sample) for sample in found.samples]
        self._oracle.step(version, rows, closes=found.closes)
        self._taken += sum(row.segment.tokens for row in rows if row.segment is not None)
        self.outbox.append(("started", version, rows, found.closes, self._taken))
        self.busy = True
        if found.closes:
            self.version, self._steps, self._drain_asked, self._taken = None, version + 1, False, 0
        return version, found.closes

    def _take(self, sample: Sample) -> Row:
        complete, end = sample.finish is not None, sample.scored_end
        if complete:
            self._finished[sample.sample_id] = (sample.attempt, sample.actor, end + 1)
            self._touched.add(sample.sample_id)
        gone, segment = sample.episode is not None and sample.finish == "failed", self.assembler.take(sample)
        return Row(sample.sample_id, end, complete, segment, sample.given, sample.episode, gone)

    def acknowledge(self) -> None:
        """Say what is held."""
        rows = [self._held(sample_id) for sample_id in sorted(self._touched)]
        self._touched.clear()
        next_step = self._steps if self.version is None else self.version
        ready = self._policy.ready_tokens(self.assembler, next_step)
        engines, taken = (next_step - 1, None) if self.version is None else (next_step, self._taken)
        hold = engines if self._policy.overfull(self.assembler, engines, taken) else None
        self.outbox.append(
            ("acks", next_step, ready, (self._taken, not self.busy, hold), [row for row in rows if row is not None])
        )

    def _held(self, sample_id: int) -> tuple[int, int, int, int] | None:
        sample = self.assembler.samples.get(sample_id)
        if sample is None:
            done = self._finished.pop(sample_id, None)
            return (sample_id, *done) if done is not None else None
        return sample_id, sample.attempt, sample.actor, sample.scored_end + (sample.finish is not None)

    def handle(self) -> None:
        """One message of the dispatcher."""
        match self.inbox.popleft() if self.inbox else None:
            case ("version", version, owed):
                self.assembler.mark(version - 1, owed)
                self.version = version
            case ("drained", version, owed):
                self.assembler.mark(version, owed)
            case ("reclaim", held):
                results = [(s, *self.assembler.give_up_attempt(s, attempt)) for s, attempt in held]
                self.outbox.append(("reclaimed", results))
            case ("save", version):
                self.checkpoint = frontier.snapshot(self.assembler, version)
