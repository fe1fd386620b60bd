"""Take steps from what is held, whole or part by part, and send them to the learner.

    assembler -> policy -> Taken -> OpenStep -> Train (ranks)     PartStarted, StepStarted, DrainRequest (dispatcher)
                                       ^ PartDone (rank 0)

A step is open from `Version` on, until its last part is sent. A policy of whole steps has one part, the last one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from opd_async.actors.intake.figures import StepFigures
from opd_async.actors.intake.filtering import GroupFilter
from opd_async.actors.intake.open_step import OpenStep, segments_of
from opd_async.actors.intake.others import OtherIntakes
from opd_async.actors.intake.ranks import LearnerRanks
from opd_async.actors.intake.report import describe_filtered, describe_rewards, describe_step
from opd_async.actors.intake.shown import ShownSamples, shown_by
from opd_async.actors.intake.steps import (
    Taken,
    give_advantages,
    pack,
    part_started,
    step_started,
    taken_of,
    trace_part,
)
from opd_async.actors.intake.unacknowledged import Unacknowledged
from opd_async.config.rewards import RewardKind
from opd_async.config.topology import ScheduleSection, StepRule, TrainOn
from opd_async.role import Role
from opd_async.run.trained import COLUMNS, TrainedRecord
from opd_async.scheduling import packing
from opd_async.scheduling.admission import bound_of
from opd_async.scheduling.assembly import Assembler, Sample
from opd_async.scheduling.filled_samples import FilledSamples
from opd_async.scheduling.filled_steps import FilledSteps
from opd_async.scheduling.segments import Segment
from opd_async.scheduling.step_policy import DeadlineCuts, StepPolicy, WholeSamples
from opd_async.transport import messages as m
from opd_async.transport.to_intakes import intake_of

log = logging.getLogger(__name__)

SETTLE_NEWS_S = 10.0


def make_policy(schedule: ScheduleSection, group_size: int) -> StepPolicy:
    """The policy that the topology asks for; groups have `group_size` samples."""
    if schedule.train_on is TrainOn.SAMPLES:
        if schedule.step_rule is StepRule.FILLED:
            return FilledSamples(schedule.samples_per_step, group_size)
        return WholeSamples(schedule.samples_per_step)
    if schedule.step_rule is StepRule.FILLED:
        return FilledSteps(schedule.tokens_per_step, schedule.max_staleness)
    return DeadlineCuts(schedule.tokens_per_step, bound_of(schedule.max_staleness))


class StepTaker:
    """Asks the policy whenever the learner has nothing to do, and sends what it chooses."""

    def __init__(self, role: Role, ranks: LearnerRanks, unacknowledged: Unacknowledged, others: OtherIntakes) -> None:
        topology = self._topology = role.plan.topology
        self._role = role
        self._metrics = role.metrics
        self._ranks, self._others = ranks, others
        self._unacknowledged = unacknowledged
        self._policy = make_policy(topology.schedule, topology.rollout.group_size)
        self._filter = GroupFilter(topology.schedule.filter, topology.rollout.group_size)
        self._figures = StepFigures(topology, role.metrics)
        self._shown = ShownSamples(shown_by(topology.telemetry.samples_per_step, 0, others.intakes))
        if (bound := topology.schedule.max_staleness) is not None:
            self._metrics["opd_intake_bound_steps"].set(bound)
        self.assembler = Assembler()
        self.steps = 0
        """Optimizer steps taken so far, resumed ones included: the next step starts from weights of this version."""
        self._version: int | None = None
        """Weights of the open step; None while none is."""
        self._step = OpenStep()
        self._drain_asked = False
        self._wake = asyncio.Event()
        self._one_part = asyncio.Lock()
        """Parts are taken one after the other, so that they reach the learner in order."""
        self._trained: TrainedRecord | None = None

    def begin(self, assembler: Assembler, steps: int, trained: TrainedRecord) -> None:
        """Go on after so many `steps` with what is held."""
        self.assembler, self.steps, self._trained = assembler, steps, trained
        self._others.assembler = assembler

    # --- what is told ------------------------------------------------------------------------------------------------

    def opens(self, version: int) -> None:
        """Engines and learner hold weights `version`: its step is open."""
        self._version = version
        now = time.monotonic()
        self._step = OpenStep(opened=now, idle_since=now)
        self._wake.set()

    def look_again(self) -> None:
        """Ask the policy again: something has changed."""
        self._wake.set()

    def part_done(self, done: m.PartDone) -> None:
        """The learner is ready for the next part, unless the step has closed meanwhile."""
        if done.version == self._version and done.part == self._step.parts - 1:
            self._step.idle_since = time.monotonic()
            self._unacknowledged.step_changed()
            self._wake.set()

    async def quiesce(self) -> int:
        """Open no further step; returns how many were taken. On cancel: the open step may still be open.

        A step that has parts closes with what they have: the learner has their gradients. What is not trained yet is
        forgotten with this run, so that no token can get too old.
        """
        async with self._one_part:
            if self._version is not None and self._step.parts:
                await self._part(self._version, [], closes=True)
            self._version = None
        return self.steps

    def acks(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> m.Acks:
        """Say what is held, by `Unacknowledged.rows`, and how far the step is."""
        next_step = self.steps if self._version is None else self._version
        ready = self._policy.ready_tokens(self.assembler, next_step)
        self._metrics["opd_intake_backlog_tokens"].set(ready)
        attempts, actors, ends = (rows[:, i].astype(np.int32) for i in (1, 2, 3))
        return m.Acks(
            next_step=next_step,
            ready_tokens=ready,
            taken_tokens=self._step.tokens,
            idle=self._step.idle_since is not None,
            hold=self._hold(),
            sample_ids=rows[:, 0],
            attempts=attempts,
            actors=actors,
            ends=ends,
        )

    def _hold(self) -> int | None:
        """The weights under which generation must stand still until the next update; None if it may go on."""
        engines, taken = (self.steps - 1, None) if self._version is None else (self._version, self._step.tokens)
        return engines if self._policy.overfull(self.assembler, engines, taken) else None

    def save(self, folder: Path) -> None:
        """Write the size of the record of steps to a checkpoint."""
        assert self._trained is not None
        self._trained.save(folder)

    def close(self) -> None:
        """Close the record of steps."""
        if self._trained is not None:
            self._trained.close()

    # --- steps -------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take a step, or a part of one, whenever the policy finds one. On cancel: the tokens stay held."""
        while True:
            try:
                async with asyncio.timeout(SETTLE_NEWS_S):
                    await self._wake.wait()
            except TimeoutError:
                self._explain_wait()
                continue
            self._wake.clear()
            async with self._one_part:
                await self._round()

    async def _round(self) -> None:
        """Ask the policy once, if the learner has nothing to do."""
        version, step = self._version, self._step
        if version is None or step.idle_since is None:
            return
        found = self._policy.round(self.assembler, version, step.tokens)
        if found.drain and not self._drain_asked:
            self._drain_asked = True
            await self._role.control.send(m.DrainRequest(version))
        if found.samples or found.closes:
            await self._part(version, [self._take(sample) for sample in found.samples], found.closes)

    def _take(self, sample: Sample) -> Taken:
        complete, end = sample.finish is not None, sample.scored_end
        if complete:
            self._unacknowledged.before_end(sample)
        return taken_of(self.assembler, sample, end, complete=complete)

    async def _part(self, version: int, taken: list[Taken], closes: bool) -> None:
        """Send a part of the open step to the learner; with the last one the step is accounted for."""
        step, part = self._step, self._step.parts
        kept = self._filter.kept(taken)
        segments = segments_of(kept)
        step.add(taken, kept, give_advantages(kept, self._topology), time.monotonic())
        trace_part(self._role.trace, version + 1, part, kept)
        if self._topology.learner.loss_mean == "responses":
            packing.mean_over_responses(segments)
        if closes:
            await self._role.control.send(self._closed(version, step, taken))
        else:
            await self._role.control.send(part_started(version, step.tokens, taken))
        await self._send(version, taken, kept, part=part, last=closes)
        if closes:
            kept, taken = ([one for one in of if self._others.mine(one.sample_id)] for of in (step.kept, step.taken))
            for one in self._shown.of_step(kept, taken, version):
                await self._role.control.send(one)

    async def _send(self, version: int, taken: list[Taken], kept: list[Taken], *, part: int, last: bool) -> None:
        """Send a part to the ranks: of what other intakes hold, by them."""
        learner, intakes = self._topology.learner, self._others.intakes
        mine, whole = segments_of(kept), None
        if intakes > 1:
            shares: list[list[Segment]] = [[] for _ in range(intakes)]
            for segment in mine:
                shares[intake_of(segment.sample_id, intakes)].append(segment)
            ranks = learner.data_parallel // intakes
            whole = await asyncio.to_thread(packing.whole_of, shares, ranks, learner.micro_batch_tokens)
            await self._others.take(taken, kept, version, whole, part=part, last=last)
            mine = shares[0]
        # in a thread: a step of a million tokens would hold up everything that arrives meanwhile
        options: dict[str, Any] = {"part": part, "last": last, "intakes": intakes, "whole": whole}
        batches = await asyncio.to_thread(pack, mine, version, learner, **options)
        await self._ranks.send_step(batches)

    def _closed(self, version: int, step: OpenStep, last: list[Taken]) -> m.StepStarted:
        """The step at `version` is complete: nothing more is taken before the next weights are out."""
        self._role.trace.span("steps", f"step {version + 1}", time.monotonic() - step.opened, tokens=step.tokens)
        self._version, self.steps = None, version + 1
        self._drain_asked = False
        self._step = OpenStep()
        segments = segments_of(step.kept)
        stats, staleness = describe_step(segments, version)
        stats |= self._figures.of_step(step.kept, segments)
        if self._filter.there:
            filtered = len(step.taken) - len(step.kept)
            stats |= describe_filtered(filtered)
            self._metrics["opd_intake_filtered_total"].inc(filtered)
        if self._topology.reward.kind is not RewardKind.NONE:
            stats |= describe_rewards(step.outcomes)
            self._metrics["opd_intake_reward_mean"].set(stats.get("reward_mean"))
        self._record(version, segments, stats, staleness)
        return step_started(version, last, step.waited_s, stats, staleness)

    def _record(self, version: int, segments: list[Segment], stats: dict[str, float], staleness: Any) -> None:
        assert self._trained is not None
        runs = [(segment, *run) for segment in segments for run in segment.versioned_runs()]
        ranges = np.array([(s.sample_id, *run) for s, *run in runs], np.int64).reshape(-1, COLUMNS)
        given = [(s.sample_id, *run) for s in segments if s.positions is not None for run in s.given_runs()]
        teachers = [s.teacher for s, *_ in runs] if len(self._topology.teachers) > 1 else []
        if not self._trained.write(version, ranges, teachers, given):
            self._role.count("unwritten_rows")
            self._metrics["opd_intake_unwritten_rows_total"].inc()
        self._role.count("steps")
        self._metrics["opd_intake_steps_total"].inc()
        self._metrics["opd_intake_cuts_total"].inc(stats["cuts"])
        self._metrics["opd_intake_recompute_tokens_total"].inc(stats["recomputed_tokens"])
        ages = np.flatnonzero(staleness)
        self._metrics["opd_intake_oldest_steps"].set(float(ages[-1]) if len(ages) else None)
        for age, count in enumerate(staleness):
            if count:
                self._metrics["opd_intake_staleness_steps"].observe(age, int(count))

    def _explain_wait(self) -> None:
        """Say in the log who a step is waiting for."""
        owed = self.assembler.owed()
        if self._version is not None and owed:
            some = ", ".join(f"{one.sample_id} (to {one.end})" for one in owed[:5])
            log.info("step %d waits for the scores of %d samples: %s", self._version, len(owed), some)
