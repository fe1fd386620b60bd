"""The intake fills a step part by part: what goes to the learner, and what the dispatcher and the log are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fake_role import Dispatcher, fake_role, make_plan, until

from opd_async.actors.intake.actor import Intake
from opd_async.plan.plan import RoleKind, RolePlan
from opd_async.run.trained import read_trained
from opd_async.transport import messages as m

BUDGET = 32
NOBODY = (np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))


@dataclass
class Bench:
    """An intake whose learner is a list."""

    intake: Intake
    dispatcher: Dispatcher
    sent: list[m.Train]
    folder: Path

    def hold(self, sample_id: int, tokens: int, *, start: int = 0, version: int = 0, ended: bool = False) -> None:
        """Scored tokens of a response arrive."""
        prompt, logprobs = np.array([7, 8], np.int32), np.full(tokens, -1.0, np.float32)
        chunk = m.Chunk(
            sample_id=sample_id,
            attempt=0,
            actor=0,
            prompt_id=0,
            prompt_tokens=2,
            start=start,
            weight_version=version,
            finish="stop" if ended else None,
            label="",
            made_at=0.0,
            token_ids=np.arange(start, start + tokens, dtype=np.int32),
            behaviour_logprobs=logprobs,
            context=prompt if start == 0 else None,
        )
        self.intake.steps.assembler.add(chunk.scored("t", 0.0, logprobs))
        self.intake.steps.look_again()

    async def trains(self, count: int) -> None:
        """Wait until the learner has been sent so many parts."""
        await until(lambda: len(self.sent) == count, f"{count} parts for the learner")

    def done(self, part: int, version: int = 0) -> None:
        """The learner has trained a part."""
        self.intake.ranks.on_part_done(m.PartDone(version, part))

    def acks(self) -> tuple[int, bool] | None:
        """What the open step has, and whether the learner waits, as the dispatcher was told last."""
        said = self.dispatcher.of(m.Acks)
        return (said[-1].taken_tokens, said[-1].idle) if said else None

    def taken(self) -> list[tuple[int, int]]:
        """(sample, end) of everything the dispatcher was told is taken, in order."""
        parts = [said for said in self.dispatcher.said if isinstance(said, m.PartStarted | m.StepStarted)]
        return [pair for said in parts for pair in zip(said.taken_ids.tolist(), said.taken_ends.tolist(), strict=True)]


@asynccontextmanager
async def filling(tmp_path: Path, **schedule: Any) -> AsyncIterator[Bench]:
    """An intake with filled steps of 32 tokens, or as `schedule` has it, at weights 0."""
    plan = make_plan(64, (), (), schedule={"steps": 9, "rule": "filled", "tokens_per_step": BUDGET} | schedule)
    role_plan = RolePlan(kind=RoleKind.INTAKE, index=0, host="127.0.0.1", devices=("cpu",), command=(), ports={})
    plan = plan.model_copy(update={"run_folder": tmp_path, "roles": (*plan.roles, role_plan)})
    async with fake_role(plan, RoleKind.INTAKE) as (role, dispatcher):
        intake, sent = Intake(role), []

        async def send(shares: list[m.Train]) -> None:
            sent.extend(shares)

        intake.ranks.send_step = send  # type: ignore[method-assign, assignment]
        await intake.restore()
        loops = [asyncio.create_task(loop) for loop in (intake.steps.run(), intake.control(), intake.acknowledge())]
        dispatcher.to_role.put_nowait(m.Version(0, *NOBODY))
        try:
            yield Bench(intake, dispatcher, sent, tmp_path)
        finally:
            for loop in loops:
                loop.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            intake.close()


def columns(parts: list[m.Train]) -> list[tuple[int, int, bool, int]]:
    return [(part.version, part.part, part.last, part.loss_tokens) for part in parts]


async def test_a_step_goes_out_in_parts_one_at_a_time(tmp_path: Path) -> None:
    async with filling(tmp_path) as bench:
        bench.hold(1, 9, ended=True)
        await bench.trains(1)
        bench.hold(2, 15, ended=True)
        bench.hold(3, 10, ended=True)
        bench.hold(4, 5)
        await asyncio.sleep(0.05)  # nothing may come while the learner is busy
        assert columns(bench.sent) == [(0, 0, False, 9)]
        bench.done(5)  # of no part that is under way
        bench.done(0, version=7)
        await asyncio.sleep(0.05)
        assert len(bench.sent) == 1
        bench.done(0)
        await bench.trains(2)
        bench.done(1)
        await bench.trains(3)
        assert columns(bench.sent) == [(0, 0, False, 9), (0, 1, False, 15), (0, 2, False, 10)]
        assert list(read_trained(bench.folder)) == []
        bench.done(2)
        await bench.trains(4)
        assert columns(bench.sent)[3] == (0, 3, True, 0)
        (started,) = bench.dispatcher.of(m.StepStarted)
        assert (started.stats["tokens"], started.stats["segments"], started.stats["cuts"]) == (34.0, 3.0, 0.0)
        assert started.staleness_counts.tolist() == [34] and started.waited_s > 0.0
        assert [part.tokens for part in bench.dispatcher.of(m.PartStarted)] == [9, 24, 34]
        assert bench.taken() == [(1, 9), (2, 15), (3, 10)]
        (row,) = read_trained(bench.folder)
        assert (row.version, row.ranges.tolist()) == (0, [[1, 0, 9, 0, 0], [2, 0, 15, 0, 0], [3, 0, 10, 0, 0]])


async def test_the_dispatcher_hears_that_the_learner_waits_though_nothing_arrives(tmp_path: Path) -> None:
    """Every response has ended and is trained: only admission can go on, if it knows that the learner waits."""
    async with filling(tmp_path) as bench:
        bench.hold(1, 31, ended=True)
        await bench.trains(1)
        await until(lambda: bench.acks() == (31, False), "the account of the part")
        bench.done(0)
        await until(lambda: bench.acks() == (31, True), "the account of the end of the part")


async def test_the_last_part_cuts_what_is_forced(tmp_path: Path) -> None:
    async with filling(tmp_path) as bench:
        bench.hold(1, BUDGET, ended=True)
        bench.hold(2, 10)
        await bench.trains(1)
        bench.done(0)
        await bench.trains(2)
        bench.dispatcher.to_role.put_nowait(m.Version(1, *NOBODY))
        bench.hold(2, 4, start=10, version=1)
        bench.hold(3, 18, version=1, ended=True)
        await bench.trains(3)
        assert columns(bench.sent)[2:] == [(1, 0, False, 18)]
        bench.done(0, version=1)
        await bench.trains(4)
        assert columns(bench.sent)[3:] == [(1, 1, True, 14)]
        assert bench.taken() == [(1, 32), (3, 18), (2, 14)]
        started = bench.dispatcher.of(m.StepStarted)[1]
        assert (started.stats["cuts"], started.staleness_counts.tolist()) == (1.0, [22, 10])


async def test_a_run_that_stops_closes_the_step_that_is_half_filled(tmp_path: Path) -> None:
    """The learner has gradients of responses that count as trained: none may be lost."""
    async with filling(tmp_path) as bench:
        bench.hold(1, 9, ended=True)
        bench.hold(2, 9)
        await bench.trains(1)
        bench.dispatcher.to_role.put_nowait(m.Quiesce("stop"))
        await until(lambda: bool(bench.dispatcher.of(m.Quiesced)), "the intake to come to rest")
        assert columns(bench.sent) == [(0, 0, False, 9), (0, 1, True, 0)]
        assert bench.dispatcher.of(m.Quiesced)[0].version == 1
        assert [row.ranges.tolist() for row in read_trained(bench.folder)] == [[[1, 0, 9, 0, 0]]]
        bench.hold(3, 40, ended=True)
        await asyncio.sleep(0.05)
        assert len(bench.sent) == 2


async def test_without_a_bound_nothing_is_cut(tmp_path: Path) -> None:
    async with filling(tmp_path, max_staleness=None) as bench:
        bench.hold(1, 10)
        for version in range(3):
            bench.hold(2 + version, BUDGET, version=version, ended=True)
            await bench.trains(2 * version + 1)
            bench.done(0, version=version)
            await bench.trains(2 * version + 2)
            bench.dispatcher.to_role.put_nowait(m.Version(version + 1, *NOBODY))
        bench.hold(1, 22, start=10, version=3, ended=True)
        await bench.trains(7)
        bench.done(0, version=3)
        await bench.trains(8)
        assert columns(bench.sent)[6:] == [(3, 0, False, 32), (3, 1, True, 0)]
        started = bench.dispatcher.of(m.StepStarted)[3]
        assert (started.stats["cuts"], started.staleness_counts.tolist()) == (0.0, [22, 0, 0, 10])


async def test_a_step_of_samples_goes_out_as_they_end(tmp_path: Path) -> None:
    async with filling(tmp_path, train_on="samples", samples_per_step=2) as bench:
        bench.hold(2, 7, ended=True)
        bench.hold(1, 9, ended=True)
        await bench.trains(1)
        bench.done(0)
        await asyncio.sleep(0.05)  # sample 0 has not ended, and sample 2 is one of the next step
        assert columns(bench.sent) == [(0, 0, False, 9)]
        bench.hold(0, 4, ended=True)
        await bench.trains(2)
        assert columns(bench.sent)[1:] == [(0, 1, True, 4)]
        bench.dispatcher.to_role.put_nowait(m.Version(1, *NOBODY))
        await bench.trains(3)
        bench.dispatcher.to_role.put_nowait(m.Quiesce("stop"))  # in the middle of a step: its gradients are not lost
        await until(lambda: bool(bench.dispatcher.of(m.Quiesced)), "the intake to come to rest")
        assert columns(bench.sent)[2:] == [(1, 0, False, 7), (1, 1, True, 0)]
        assert [row.ranges.tolist() for row in read_trained(bench.folder)] == [
            [[1, 0, 9, 0, 0], [0, 0, 4, 0, 0]],
            [[2, 0, 7, 0, 0]],
        ]


async def test_a_run_that_stops_begins_no_step(tmp_path: Path) -> None:
    async with filling(tmp_path) as bench:
        await until(lambda: bench.intake.steps._version == 0, "weights 0")
        bench.dispatcher.to_role.put_nowait(m.Quiesce("stop"))
        await until(lambda: bool(bench.dispatcher.of(m.Quiesced)), "the intake to come to rest")
        assert bench.dispatcher.of(m.Quiesced)[0].version == 0 and bench.sent == []


async def test_a_checkpoint_between_steps_has_every_part(tmp_path: Path) -> None:
    async with filling(tmp_path) as bench:
        bench.hold(1, BUDGET, ended=True)
        bench.hold(2, 10)
        await bench.trains(1)
        bench.done(0)
        await bench.trains(2)
        state: Any = bench.intake.steps.assembler
        assert 1 in state.completed and state.samples[2].trained_end == 0
