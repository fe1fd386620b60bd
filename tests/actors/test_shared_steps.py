"""Two intakes: the first decides, both hold and feed a rank each; what they say together is what one would say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq.asyncio
from deadlines import patience
from fake_role import Dispatcher, fake_role, make_plan, until

from opd_async.actors.intake.actor import Intake
from opd_async.actors.intake.holding import HoldingIntake
from opd_async.errors import RoleError
from opd_async.plan.free_ports import free_ports
from opd_async.plan.plan import Plan, RoleKind, RolePlan
from opd_async.run.trained import read_trained
from opd_async.scheduling import frontier
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlClient
from opd_async.transport.to_intakes import ToIntakes

BUDGET = 32
NOBODY = (np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32))


def two_intakes(folder: Path, **sections: Any) -> Plan:
    """A plan with two intakes and two ranks."""
    schedule = {"steps": 9, "rule": "deadline", "tokens_per_step": BUDGET}
    plan = make_plan(64, (), (), schedule=schedule, learner={"data_parallel": 2}, **sections)
    ports = [f"tcp://127.0.0.1:{port}" for port in free_ports("127.0.0.1", 4)]
    intakes = tuple(
        RolePlan(kind=RoleKind.INTAKE, index=index, host="127.0.0.1", devices=("cpu",), command=(), ports={})
        for index in range(2)
    )
    update = {"run_folder": folder, "roles": (*plan.roles, *intakes), "scored": (*ports[:2],), "batches": (*ports[2:],)}
    return plan.model_copy(update=update)


@dataclass
class Bench:
    """Both intakes, and their ranks as sockets."""

    first: Intake
    second: HoldingIntake
    dispatcher: Dispatcher
    to_intakes: ToIntakes
    ranks: list[ControlClient]

    async def hold(self, sample_id: int, tokens: int, *, start: int = 0, ended: bool = False, attempt: int = 0) -> None:
        """Scored tokens of a response arrive, wherever they belong."""
        made = m.Chunk(
            sample_id=sample_id,
            attempt=attempt,
            actor=0,
            prompt_id=0,
            prompt_tokens=2,
            start=start,
            weight_version=0,
            finish="stop" if ended else None,
            label="",
            made_at=0.0,
            token_ids=np.arange(start, start + tokens, dtype=np.int32),
            behaviour_logprobs=np.full(tokens, -1.0, np.float32),
            context=np.arange(2 + start, dtype=np.int32) if start == 0 or attempt else None,
        )
        await self.to_intakes.send(replace(made.scored("teacher-0", 0.0, made.behaviour_logprobs), teacher="teacher"))

    async def trained(self) -> list[m.Train]:
        """What each rank is told to train next."""
        async with asyncio.timeout(patience(20)):
            return [await rank.receive() for rank in self.ranks]

    async def says(self, kind: type, count: int = 1) -> list[Any]:
        """What the dispatcher has heard of this kind, once there are so many."""
        await until(lambda: len(self.dispatcher.of(kind)) >= count, f"{count} x {kind.__name__}")
        return self.dispatcher.of(kind)

    def acknowledged(self) -> dict[int, int]:
        """The end of each sample by the last acknowledgement."""
        said = self.dispatcher.of(m.Acks)
        pairs = (zip(acks.sample_ids.tolist(), acks.ends.tolist(), strict=True) for acks in said)
        return {sample_id: end for of in pairs for sample_id, end in of}

    async def knows(self, sample_id: int, end: int) -> None:
        """Wait until the first intake knows that so much of a sample is held."""

        def there() -> bool:
            sample = self.first.steps.assembler.samples.get(sample_id)
            return sample is not None and sample.scored_end == end

        await until(there, f"{end} tokens of sample {sample_id}")


@asynccontextmanager
async def running(folder: Path, **sections: Any) -> AsyncIterator[Bench]:
    """Both intakes at work, at weights 0."""
    plan, context = two_intakes(folder, **sections), zmq.asyncio.Context()
    async with AsyncExitStack() as stack:
        stack.callback(context.destroy, linger=0)
        role, dispatcher = await stack.enter_async_context(fake_role(plan, RoleKind.INTAKE))
        other, _ = await stack.enter_async_context(fake_role(plan, RoleKind.INTAKE, 1))
        first, second = Intake(role), HoldingIntake(other)
        stack.callback(first.close)
        stack.callback(second.close)
        ranks = [ControlClient(context, plan.batches[rank], f"rank-{rank}") for rank in range(2)]
        to_intakes = ToIntakes(context, plan.scored, None)
        for rank in ranks:
            stack.enter_context(rank)
            await rank.send(m.Hello("learner-0", "x"))
        stack.callback(to_intakes.close)
        await first.restore()
        await second.restore()
        for loop in (first.control, first.ranks.collect, first.receive, first.acknowledge, first.steps.run):
            role.spawn(loop(), loop.__name__)
        second.start()
        dispatcher.to_role.put_nowait(m.Version(0, *NOBODY))
        yield Bench(first, second, dispatcher, to_intakes, ranks)
        role.cancel()
        other.cancel()


async def test_a_step_is_shared_and_both_ranks_know_the_tokens_of_the_whole(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.hold(0, 10, ended=True)
        await bench.hold(1, 12)
        await bench.hold(1, 3, start=12, ended=True)
        await bench.hold(3, 9, ended=True)
        trains = await bench.trained()
        assert [(one.version, one.part, one.last, one.loss_tokens) for one in trains] == [(0, 0, True, 34)] * 2
        assert [one.sample_ids.tolist() for one in trains if one.sample_ids is not None] == [[0], [1, 3]]
        assert [len(one.rows) for one in trains] == [10, 24]
        assert len({len(one.mb_tokens) for one in trains}) == 1
        np.testing.assert_array_equal(trains[1].token_ids[:17], [0, 1, *range(15)])
        (started,) = await bench.says(m.StepStarted)
        assert (started.stats["tokens"], started.stats["completed"]) == (34.0, 3.0)
        assert started.stats["sampled_entropy"] == pytest.approx(1.0)
        (row,) = read_trained(tmp_path)
        assert sorted(row.ranges.tolist()) == [[0, 0, 10, 0, 0], [1, 0, 15, 0, 0], [3, 0, 9, 0, 0]]
        await until(lambda: 3 in bench.second.assembler.completed, "the second intake to forget")
        assert not bench.second.assembler.samples
        await until(lambda: bench.acknowledged() == {0: 11, 1: 16, 3: 10}, "all acknowledgements")
        # a chunk comes again, because an acknowledgement was lost
        await bench.hold(5, 4)
        await bench.knows(5, 4)
        before = len(bench.dispatcher.of(m.Acks))
        await bench.hold(5, 4)
        await until(
            lambda: any(5 in said.sample_ids for said in bench.dispatcher.of(m.Acks)[before:]), "an acknowledgement"
        )


async def test_commands_reach_all_ranks_and_checkpoints_have_the_tokens_of_both(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.hold(0, 6)
        await bench.hold(1, 7)
        await bench.hold(2, 40, ended=True)
        for sample_id, end in ((0, 6), (1, 7)):
            await bench.knows(sample_id, end)
        assert [one.loss_tokens for one in await bench.trained()] == [40, 40]
        bench.dispatcher.to_role.put_nowait(m.Version(1, *NOBODY))
        await bench.hold(4, 40, ended=True)
        assert [one.loss_tokens for one in await bench.trained()] == [53, 53]  # 0 and 1 are cut: they are due
        folder = tmp_path / "checkpoints" / "step_00000002"
        bench.dispatcher.to_role.put_nowait(m.SaveCheckpoint(2, str(folder)))
        assert {type(one) for one in await bench.trained()} == {m.SaveCheckpoint}
        state = frontier.load(folder)
        assert (state.partial_ids.tolist(), state.partial_ends.tolist()) == ([0, 1], [6, 7])
        assert state.partial_tokens.tolist() == [*range(6), *range(7)]
        bench.dispatcher.to_role.put_nowait(m.SyncWeights("g", [], True))
        bench.dispatcher.to_role.put_nowait(m.Stop("over"))
        for kind in (m.SyncWeights, m.Stop):
            assert {type(one) for one in await bench.trained()} == {kind}


async def test_samples_of_a_dead_actor_are_asked_of_who_holds_them(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        await bench.hold(0, 6)
        await bench.hold(1, 7)
        await bench.hold(3, 2, ended=True)
        await until(lambda: 3 in bench.second.assembler.samples, "the chunks")
        ids = np.array([0, 1, 3, 5], np.int64)
        bench.dispatcher.to_role.put_nowait(m.Reclaim(ids, np.zeros(4, np.int32)))
        (said,) = await bench.says(m.Reclaimed)
        assert said.sample_ids.tolist() == ids.tolist()
        assert (said.attempts.tolist(), said.ends.tolist()) == ([1, 1, 0, 1], [6, 7, 0, 0])
        assert (said.complete.tolist(), said.tokens.tolist()) == ([0, 0, 1, 0], [*range(6), *range(7)])
        await bench.hold(1, 4, start=7)  # of the attempt that has ended
        await bench.hold(1, 30, start=7, ended=True, attempt=1)
        trains = await bench.trained()
        assert [len(one.rows) for one in trains] == [0, 39]
        assert trains[0].loss_tokens == 39


async def test_what_the_second_does_not_hold_cannot_be_taken(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        with pytest.raises(RoleError, match="takes sample 1 up to 5, which intake-1 does not hold"):
            bench.second._taken_of(1, 5, False)
