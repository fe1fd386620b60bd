"""Evaluations whose rollout actors end, leave, or are not up: every response comes once, of an actor that is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq.asyncio
from deadlines import once, patience
from small_runs import small_topology

from opd_async.config.evaluating import EvaluationSet, evaluation_sets
from opd_async.config.topology import EvaluationSection
from opd_async.data.completions import CompletionSet, Mix
from opd_async.data.prompts import Prompt
from opd_async.keys import RunKeys
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import make_plan
from opd_async.run import evaluation_responses
from opd_async.run.dispatcher import Dispatcher
from opd_async.run.evaluation_responses import EVAL_IDS, Response, Responses
from opd_async.run.ledger import Ledger
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport.messages import EvalDone, Lease, LeaseKind

FIRST, SECOND = "rollout-0", "rollout-1"
SETS = evaluation_sets(
    EvaluationSection.model_validate({"sets": {name: {"path": f"{name}.jsonl"} for name in ("sums", "words")}}),
    None,
    32,
    64,
)


class Fleet:
    """Of the fleet, what the dispatcher looks at."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.keys = plan, RunKeys.draw()
        self._roles = {role.name: role for role in plan.roles}
        self.say: Callable[[str], None] = lambda line: None

    def role(self, name: str) -> Any:
        return self._roles[name]

    def incarnation(self, name: str) -> str | None:
        return "1"


class Run:
    """A dispatcher with two actors, whose post is kept here, and an evaluation on two sets."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.sent: list[tuple[str, Lease]] = []
        self.unreachable: set[str] = set()
        self.responses = Responses(dispatcher)
        dispatcher.on_eval_done, dispatcher.on_gone = self.responses.deliver, self.responses.lost
        server: Any = self
        dispatcher.server = server

    async def send(self, actor: str, message: Lease) -> bool:
        self.sent.append((actor, message))
        return actor not in self.unreachable

    async def evaluate(self, count: int = 4, slots: int = 100) -> dict[str, list[Response]]:
        """Responses to the same prompts in both sets at once."""
        room = asyncio.Semaphore(slots)
        prompts = [Prompt(index, np.array([1, 3], np.int32), "b", {}) for index in range(count)]

        async def on(one: EvaluationSet) -> list[Response]:
            return await self.responses.of(LeaseKind.EVAL_STUDENT, one, prompts, 1.0, room)

        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(on(one)) for name, one in SETS.items()}
        return {name: task.result() for name, task in tasks.items()}

    def comes_up(self, actor: str) -> None:
        self.dispatcher._up.add(actor)
        self.dispatcher._arrived.set()

    def answer(self, actor: str, leases: list[tuple[str, Lease]]) -> None:
        """Answer those leases that are of this actor, each with its own number as a token."""
        for who, lease in leases:
            if who == actor:
                token = np.array([lease.sample_id - EVAL_IDS], np.int32)
                self.dispatcher.on_eval_done(
                    EvalDone(sample_id=lease.sample_id, finish="stop", weight_version=0, token_ids=token)
                )


@asynccontextmanager
async def a_run(folder: Path) -> AsyncIterator[Run]:
    plan = make_plan(small_topology(folder, "engines.student.replicas=2", "rollout.replicas=2"))
    with zmq.asyncio.Context() as context:
        mix, fleet = Mix(CompletionSet().completions, 1.0, 0, False), Fleet(plan)
        dispatcher = Dispatcher(plan, fleet, Ledger(plan=plan), RoleMetrics("launcher"), context, [], mix)  # type: ignore[arg-type]
        dispatcher.close()
        yield Run(dispatcher)


def asked(leases: list[tuple[str, Lease]]) -> list[tuple[str, int]]:
    """Set and prompt of each lease."""
    return sorted((lease.evaluation_set, lease.prompt_id) for _, lease in leases)


EVERYTHING = sorted((name, index) for name in SETS for index in range(4))


def tokens(found: dict[str, list[Response]]) -> set[int]:
    """The numbers of the leases whose responses count."""
    return {int(done.token_ids[0]) for responses in found.values() for _, done in responses}


@pytest.mark.parametrize("back", [False, True])
async def test_what_an_actor_leaves_behind_is_begun_anew(tmp_path: Path, back: bool) -> None:
    """It has answered some; what it says of the others after its end, or another start of it, counts for nothing."""
    async with a_run(tmp_path) as run:
        for actor in (FIRST, SECOND):
            run.comes_up(actor)
        evaluation = asyncio.create_task(run.evaluate())
        await once(lambda: len(run.sent) == 8)
        before = run.sent[:]
        mine = [one for one in before if one[0] == SECOND]
        assert asked(before) == EVERYTHING and len(mine) == 4
        run.answer(SECOND, mine[:1])
        await once(lambda: len(run.responses._waiting) == 7)
        run.dispatcher.gone(SECOND)
        if back:
            run.comes_up(SECOND)
        run.answer(SECOND, before)
        await once(lambda: len(run.sent) == 11)
        assert asked(run.sent[8:]) == asked(mine[1:])
        assert {actor for actor, _ in run.sent[8:]} == ({FIRST, SECOND} if back else {FIRST})
        run.answer(FIRST, run.sent)
        run.answer(SECOND, run.sent[8:])
        found = await asyncio.wait_for(evaluation, patience(5.0))
        counted = [mine[0], *(one for one in before if one[0] == FIRST), *run.sent[8:]]
        assert tokens(found) == {lease.sample_id - EVAL_IDS for _, lease in counted} and len(tokens(found)) == 8
        assert {name: [prompt.prompt_id for prompt, _ in of] for name, of in found.items()} == {
            name: [0, 1, 2, 3] for name in SETS
        }


async def test_leases_wait_for_an_actor_where_none_is_up(tmp_path: Path) -> None:
    """Before the first one is up, and again between the ends of all and the start of another."""
    async with a_run(tmp_path) as run:
        evaluation = asyncio.create_task(run.evaluate(slots=2))
        for _ in range(20):
            await asyncio.sleep(0)
        assert run.sent == []
        run.comes_up(FIRST)
        await once(lambda: len(run.sent) == 2)
        run.dispatcher.gone(FIRST)
        run.comes_up(SECOND)
        for number in range(8):
            await once(lambda number=number: len(run.sent) > 2 + number)  # type: ignore[misc]
            run.answer(SECOND, run.sent[2 + number :])
        assert tokens(await asyncio.wait_for(evaluation, patience(5.0))) == set(range(2, 10))
        assert asked(run.sent[2:]) == EVERYTHING


async def test_an_actor_that_cannot_be_reached_is_left_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is among the connected ones until that is seen."""
    monkeypatch.setattr(evaluation_responses, "UNREACHED_S", 0.0)
    async with a_run(tmp_path) as run:
        run.unreachable.add(SECOND)
        for actor in (FIRST, SECOND):
            run.comes_up(actor)
        evaluation = asyncio.create_task(run.evaluate())
        await once(lambda: [actor for actor, _ in run.sent].count(FIRST) == 8)
        run.answer(FIRST, run.sent)
        assert sorted(map(len, (await asyncio.wait_for(evaluation, patience(5.0))).values())) == [4, 4]


async def test_an_evaluation_that_is_given_up_waits_for_nobody(tmp_path: Path) -> None:
    async with a_run(tmp_path) as run:
        run.comes_up(FIRST)
        evaluation = asyncio.create_task(run.evaluate())
        await once(lambda: len(run.sent) == 8)
        evaluation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await evaluation
        run.dispatcher.gone(FIRST)
        run.answer(FIRST, run.sent)
        assert run.responses._waiting == {} and len(run.sent) == 8
