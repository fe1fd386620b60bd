"""Assemble scored chunks, take steps, and feed the learner's ranks.

    scored chunks (PULL) -> assembler -> policy (deadline cuts) -> packing -> learner ranks (ROUTER)
                               | acknowledgements (control)            ^ weight syncs, checkpoints (control)

    loop         waits for                          unblocked by
    receive      a scored chunk                     a teacher actor
    steps        tokens that a step may take        a chunk; `Version` after a weight update
    acknowledge  time                               the clock
    control      a message of the dispatcher        the dispatcher
    ranks        a learner rank's hello             the learner

The dispatcher's commands for the learner pass through here, so that every rank sees steps, weight updates and
checkpoints in one order. On cancel: nothing is saved; a restart goes back to the last checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from opd_async.actors.intake.figures import StepFigures
from opd_async.actors.intake.filtering import GroupFilter
from opd_async.actors.intake.ranks import LearnerRanks
from opd_async.actors.intake.report import LatencyReservoir, describe_filtered, describe_rewards, describe_step
from opd_async.actors.intake.shown import ShownSamples
from opd_async.actors.intake.steps import Taken, give_advantages, pack, step_started
from opd_async.config.rewards import RewardKind
from opd_async.config.topology import ScheduleSection, TrainOn
from opd_async.errors import StorageError
from opd_async.files import storing
from opd_async.plan.chunk_bounds import ChunkBounds
from opd_async.plan.plan import RoleKind
from opd_async.role import ATTEMPT_FLOOR_ENV, Role, role_arguments
from opd_async.run.checkpoints import chosen
from opd_async.run.trained import COLUMNS, TrainedRecord
from opd_async.scheduling import frontier, packing
from opd_async.scheduling.assembly import Assembler, Sample, Segment, Verdict
from opd_async.scheduling.step_policy import DeadlineCuts, StepPolicy, WholeSamples
from opd_async.transport import messages as m
from opd_async.transport.bounds import MAX_COUNT
from opd_async.transport.channels import Pull
from opd_async.transport.owed import Owed

log = logging.getLogger(__name__)

ACKNOWLEDGE_S = 0.02
SETTLE_NEWS_S = 10.0


def make_policy(schedule: ScheduleSection) -> StepPolicy:
    """The policy that the topology asks for."""
    if schedule.train_on is TrainOn.SAMPLES:
        return WholeSamples(schedule.samples_per_step)
    return DeadlineCuts(schedule.tokens_per_step, schedule.max_staleness)


class Intake:
    """The one intake of a run."""

    def __init__(self, role: Role) -> None:
        plan = role.plan
        self._role = role
        self._topology = plan.topology
        self._metrics = role.metrics
        self._policy = make_policy(plan.topology.schedule)
        self._filter = GroupFilter(plan.topology.schedule.filter, plan.topology.rollout.group_size)
        self._assembler = Assembler()
        self._version: int | None = None
        self._steps = 0
        """Optimizer steps taken so far, resumed ones included: the next step starts from weights of this version."""
        self._attempt_floor = 0
        self._drain_asked = False
        self._wake = asyncio.Event()
        """Set when a step may have become possible."""
        self._unacknowledged: set[int] = set()
        """Samples of which more is held than was acknowledged."""
        self._taken_whole: dict[int, tuple[int, int, int]] = {}
        """(attempt, actor, end) of complete samples that a step took before their end was acknowledged."""
        self._latencies = LatencyReservoir()
        self._figures = StepFigures(plan.topology, role.metrics)
        self._shown = ShownSamples(plan.topology.telemetry.samples_per_step)
        self._door = role.guard()
        self._bounds = ChunkBounds(plan, self._door.keys)
        self._pull = Pull(role.context, plan.scored, self._malformed_frame, door=self._door)
        self.ranks = LearnerRanks(role.context, plan, self._malformed_frame, self._door)
        self._trained: TrainedRecord | None = None

    async def restore(self) -> None:
        """Go back to the newest checkpoint, or to nothing, and tell the dispatcher what has been trained."""
        folder = chosen(self._role.plan.run_folder / "checkpoints")
        state = frontier.load(folder) if folder is not None else frontier.empty(0)
        floor = self._attempt_floor = int(os.environ.get(ATTEMPT_FLOOR_ENV, "0"))
        opd = self._topology.opd
        self._assembler = frontier.restore(state, floor, opd.wire_topk, opd.on_engines)
        self._steps = state.version
        # steps after the checkpoint will be taken again: their rows leave the file
        self._trained = TrainedRecord(self._role.plan.run_folder, log.warning, state.version, folder)
        await self._role.control.send(state)

    async def receive(self) -> None:
        """Take scored chunks in. On cancel: chunks in the socket are lost, and sent again by the rollout actors."""
        while True:
            sender, chunk = await self._pull.receive_from()
            if not isinstance(chunk, m.ScoredChunk):
                self._malformed_frame(f"a {type(chunk).__name__} among scored chunks")
                continue
            if problem := self._unbelievable(sender, chunk):
                self._count(Verdict.MALFORMED, chunk, problem)
                continue
            verdict = self._assembler.add(chunk, self._oldest())
            self._count(verdict, chunk)
            if verdict is Verdict.ACCEPTED or verdict is Verdict.DUPLICATE:
                self._unacknowledged.add(chunk.sample_id)
                self._wake.set()

    def _unbelievable(self, sender: str | None, chunk: m.ScoredChunk) -> str | None:
        """Why a chunk cannot be; what an earlier launch of the learner left under way may be, and is dropped later."""
        left_over = chunk.attempt < self._attempt_floor
        return self._bounds.of_scored(sender, chunk, newest=MAX_COUNT if left_over else self._steps)

    def _oldest(self) -> int:
        """No token of older weights may be new: every step so far waited for them."""
        schedule = self._topology.schedule
        return max(self._steps - schedule.max_staleness - 1, 0) if schedule.train_on is TrainOn.TOKENS else 0

    def _count(self, verdict: Verdict, chunk: m.ScoredChunk, problem: str = "malformed") -> None:
        if verdict is Verdict.ACCEPTED or verdict is Verdict.EARLY:
            self._role.count("tokens", len(chunk.token_ids))
            self._metrics["opd_intake_scored_tokens_total"].inc(len(chunk.token_ids))
            if chunk.finish is not None:
                self._latencies.add(chunk.latency_s)
        elif verdict is Verdict.MALFORMED:
            self._role.count("malformed_chunks")
            self._metrics["opd_intake_malformed_total"].labels("chunk").inc()
            log.warning("dropped a chunk of sample %d from %s: %s", chunk.sample_id, chunk.teacher_id, problem)
        else:
            self._role.count(f"{verdict.value}_chunks")
            self._metrics["opd_intake_duplicates_total"].inc()

    async def acknowledge(self) -> None:
        """Tell the dispatcher every 20 ms what is held. On cancel: chunks that were not acknowledged come again."""
        while True:
            await asyncio.sleep(ACKNOWLEDGE_S)
            if not self._unacknowledged:
                continue
            rows = [self._held(sample_id) for sample_id in self._unacknowledged]
            self._unacknowledged.clear()
            table = np.array([row for row in rows if row is not None], np.int64).reshape(-1, 4)
            next_step = self._steps if self._version is None else self._version
            ready = self._policy.ready_tokens(self._assembler, next_step)
            self._metrics["opd_intake_backlog_tokens"].set(ready)
            attempts, actors, ends = (table[:, i].astype(np.int32) for i in (1, 2, 3))
            acks = m.Acks(
                next_step=next_step,
                ready_tokens=ready,
                sample_ids=table[:, 0],
                attempts=attempts,
                actors=actors,
                ends=ends,
            )
            await self._role.control.send(acks)
            self._role.counters.update(self._latencies.quantiles())

    def _held(self, sample_id: int) -> tuple[int, int, int, int] | None:
        sample = self._assembler.samples.get(sample_id)
        if sample is None:
            done = self._taken_whole.pop(sample_id, None)
            return (sample_id, *done) if done is not None else None
        return sample_id, sample.attempt, sample.actor, sample.scored_end + (sample.finish is not None)

    # --- steps -------------------------------------------------------------------------------------------------------

    async def take_steps(self) -> None:
        """Take a step whenever the policy finds one. On cancel: the tokens stay held."""
        while True:
            try:
                async with asyncio.timeout(SETTLE_NEWS_S):
                    await self._wake.wait()
            except TimeoutError:
                self._explain_wait()
                continue
            self._wake.clear()
            if self._version is None:
                continue
            found = self._policy.round(self._assembler, self._version, 0)
            if found.closes:
                await self._step(self._version, [self._take(sample) for sample in found.samples])
            elif found.drain and not self._drain_asked:
                self._drain_asked = True
                await self._role.control.send(m.DrainRequest(self._version))

    def _take(self, sample: Sample) -> Taken:
        complete, end = sample.finish is not None, sample.scored_end
        if complete:
            # its last chunk may not have been acknowledged yet, and it is about to be forgotten
            self._taken_whole[sample.sample_id] = (sample.attempt, sample.actor, sample.scored_end + 1)
            self._unacknowledged.add(sample.sample_id)
        segment = self._assembler.take(sample)
        return Taken(
            sample_id=sample.sample_id,
            end=end,
            complete=complete,
            segment=segment,
            reward=sample.reward,
            finish=sample.finish,
            prompt_id=sample.prompt_id,
        )

    async def _step(self, version: int, taken: list[Taken]) -> None:
        self._version = None
        self._steps = version + 1
        self._drain_asked = False
        kept = self._filter.kept(taken)
        segments = [one.segment for one in kept if one.segment is not None]
        outcomes = give_advantages(kept, self._topology)
        if self._topology.learner.loss_mean == "responses":
            packing.mean_over_responses(segments)
        stats, staleness = describe_step(segments, version)
        stats |= self._figures.of_step(kept, segments)
        if self._filter.there:
            stats |= describe_filtered(len(taken) - len(kept))
            self._metrics["opd_intake_filtered_total"].inc(len(taken) - len(kept))
        if self._topology.reward.kind is not RewardKind.NONE:
            stats |= describe_rewards(outcomes)
            self._metrics["opd_intake_reward_mean"].set(stats.get("reward_mean"))
        self._record(version, segments, stats, staleness)
        await self._role.control.send(step_started(version, taken, stats, staleness))
        # in a thread: a step of a million tokens would hold up everything that arrives meanwhile
        await self.ranks.send_step(await asyncio.to_thread(pack, segments, version, self._topology.learner))
        for one in self._shown.of_step(kept, taken, version):
            await self._role.control.send(one)

    def _record(self, version: int, segments: list[Segment], stats: dict[str, float], staleness: Any) -> None:
        ranges = [(s.sample_id, s.start, s.end, int(s.versions.min()), int(s.versions.max())) for s in segments]
        assert self._trained is not None
        teachers = [s.teacher for s in segments] if len(self._topology.teachers) > 1 else []
        if not self._trained.write(version, np.array(ranges, np.int64).reshape(-1, COLUMNS), teachers):
            self._role.count("unwritten_rows")
            self._metrics["opd_intake_unwritten_rows_total"].inc()
        self._role.count("steps")
        self._metrics["opd_intake_steps_total"].inc()
        self._metrics["opd_intake_cuts_total"].inc(stats["cuts"])
        self._metrics["opd_intake_recompute_tokens_total"].inc(stats["recomputed_tokens"])
        for age, count in enumerate(staleness):
            if count:
                self._metrics["opd_intake_staleness_steps"].observe(age, int(count))

    def _explain_wait(self) -> None:
        """Say in the log who a step is waiting for."""
        owed = self._assembler.owed()
        if self._version is not None and owed:
            some = ", ".join(f"{one.sample_id} (to {one.end})" for one in owed[:5])
            log.info("step %d waits for the scores of %d samples: %s", self._version, len(owed), some)

    # --- control -----------------------------------------------------------------------------------------------------

    async def control(self) -> None:
        """Handle the dispatcher's messages in order; those for the learner are passed on to every rank."""
        while True:
            message = await self._role.control.receive()
            match message:
                case m.Version():
                    self._assembler.mark(message.version - 1, Owed.listed_in(message))
                    self._version = message.version
                    self._wake.set()
                case m.Drained():
                    self._assembler.mark(message.version, Owed.listed_in(message))
                    self._wake.set()
                case m.Quiesce():
                    self._version = None
                    await self._role.control.send(m.Quiesced(self._steps))
                case m.Reclaim():
                    await self._reclaim(message)
                case m.SaveCheckpoint():
                    await self._save(message)
                case m.SyncWeights() | m.ExportModel():
                    await self.ranks.send_all(message)
                case m.Stop():
                    await self.ranks.send_all(message)
                    self._role.stopped.set()
                case _:
                    log.warning("ignored a %s", type(message).__name__)

    async def _save(self, command: m.SaveCheckpoint) -> None:
        """Write the frontier and pass the command on; where there is no room for it, the dispatcher decides."""
        assert self._trained is not None
        folder = Path(command.folder)
        try:
            with storing(folder):
                frontier.save(frontier.snapshot(self._assembler, command.step), folder)
                self._trained.save(folder)
        except StorageError as error:
            await self._role.control.send(m.NotSaved(command.step, str(error)))
        else:
            await self.ranks.send_all(command)

    async def _reclaim(self, request: m.Reclaim) -> None:
        pairs = zip(request.sample_ids.tolist(), request.attempts.tolist(), strict=True)
        results = [self._assembler.give_up_attempt(sample_id, attempt) for sample_id, attempt in pairs]
        tokens = [one.tokens for one in results]
        await self._role.control.send(
            m.Reclaimed(
                sample_ids=request.sample_ids,
                attempts=np.array([one.attempt for one in results], np.int32),
                ends=np.array([len(prefix) for prefix in tokens], np.int32),
                complete=np.array([one.complete for one in results], np.int32),
                tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
            )
        )
        self._wake.set()

    def _malformed_frame(self, reason: str) -> None:
        self._role.count("malformed_frames")
        self._metrics["opd_intake_malformed_total"].labels("frame").inc()

    def close(self) -> None:
        """Close sockets and the log."""
        self._pull.close()
        self.ranks.close()
        self._door.close()
        if self._trained is not None:
            self._trained.close()


async def main() -> None:
    """Run the intake until the dispatcher says stop."""
    plan, _ = role_arguments("Intake: assemble, take steps, pack.")
    async with Role.open(RoleKind.INTAKE, plan, 0) as role:
        intake = Intake(role)
        try:
            await intake.restore()
            for loop, name in (
                (intake.control(), "control"),
                (intake.ranks.collect(), "ranks"),
                (intake.receive(), "receive"),
                (intake.acknowledge(), "acknowledge"),
                (intake.take_steps(), "steps"),
            ):
                role.spawn(loop, name)
            await role.until_stopped()
        finally:
            intake.close()
