"""Chunks of a run without teacher engines go to the intake as they are, with nothing of a teacher on them."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import zmq.asyncio
from deadlines import patience

from opd_async.actors.rollout.downstream import Downstream, unscored
from opd_async.config.topology import Topology
from opd_async.plan.free_ports import free_ports
from opd_async.plan.plan import Plan, RoleKind, RolePlan
from opd_async.transport.channels import Pull
from opd_async.transport.messages import Chunk, ScoredChunk

TEACHERS = ("math", "math", "code")
"""Of each teacher actor."""


def chunk(prompt_id: int, **changes: object) -> Chunk:
    ids = np.array([5, 6], np.int32)
    made = Chunk(
        sample_id=4,
        attempt=1,
        actor=0,
        prompt_id=prompt_id,
        prompt_tokens=3,
        start=7,
        weight_version=2,
        finish="stop",
        label="label",
        made_at=0.0,
        token_ids=ids,
        behaviour_logprobs=np.array([-1.0, -2.0], np.float32),
        context=None,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def plan(scored: str, chunks: tuple[str, ...], use_opd: bool) -> Plan:
    """As much of a plan as says where chunks go."""
    topology = Topology.model_validate(
        {
            "name": "x",
            "models": {"student": {"path": Path("s")}},
            "data": {"train": {"path": Path("p")}},
            "schedule": {"steps": 1},
            "opd": {"use_opd": use_opd},
        }
    )
    roles = tuple(
        RolePlan.model_construct(kind=RoleKind.TEACHER, index=index, teacher=teacher)
        for index, teacher in enumerate(TEACHERS[: len(chunks)])
    )
    return Plan.model_construct(topology=topology, scored=(scored,), chunks=chunks, roles=roles)


async def delivered(use_opd: bool) -> list[list[object]]:
    """What arrives at the intake and at three teacher actors after one chunk of each of 20 prompts, 5 of them code."""
    addresses = [f"tcp://127.0.0.1:{port}" for port in free_ports("127.0.0.1", 4)]
    context = zmq.asyncio.Context()
    pulls = [Pull(context, address, lambda reason: None) for address in addresses]
    downstream = Downstream(context, plan(addresses[0], tuple(addresses[1:]), use_opd), "rollout-0")
    try:
        arrived: list[list[object]] = [[], [], [], []]
        complete = asyncio.Event()
        for prompt_id in range(20):
            teacher = "math" if prompt_id % 4 else "code"
            route = (prompt_id % 2 if prompt_id % 4 else 2) if use_opd else 0
            await downstream.send(route, chunk(prompt_id, teacher=teacher))
        async with asyncio.timeout(patience(20)), asyncio.TaskGroup() as group:

            async def collect(index: int) -> None:
                while True:
                    arrived[index].append(await pulls[index].receive())
                    if sum(map(len, arrived)) == 20:
                        complete.set()

            tasks = [group.create_task(collect(index)) for index in range(4)]
            await complete.wait()
            for task in tasks:
                task.cancel()
        return arrived
    finally:
        downstream.close()
        for pull in pulls:
            pull.close()
        context.term()


async def test_chunks_go_to_the_teacher_of_their_lease_or_straight_to_the_intake() -> None:
    intake, first, second, third = await delivered(use_opd=True)
    assert not intake and first and second and len(first) + len(second) == 15 and len(third) == 5
    for chunks, teacher in ((first, "math"), (second, "math"), (third, "code")):
        assert all(isinstance(one, Chunk) and one.teacher == teacher for one in chunks)
    intake, *actors = await delivered(use_opd=False)
    assert not any(actors) and len(intake) == 20
    assert all(isinstance(one, ScoredChunk) for one in intake)


def test_an_unscored_chunk_keeps_everything_but_a_score() -> None:
    context = np.arange(10, dtype=np.int32)
    own, other = np.arange(3, dtype=np.int32), np.arange(4, dtype=np.int32)
    made = chunk(6, context=context, teacher_prompt=own, teacher_prompt_tokens=3)
    made = dataclasses.replace(made, contrast_prompt=other, contrast_prompt_tokens=4)
    found = unscored(made, "rollout-1")
    for field in dataclasses.fields(Chunk):
        # how long a teacher's prompt is says the prompt itself, which the learner's teacher is given
        if field.name not in ("made_at", "teacher_prompt_tokens", "contrast_prompt_tokens"):
            assert getattr(found, field.name) is getattr(made, field.name), field.name
    assert found.teacher_id == "rollout-1" and len(found.teacher_logprobs) == 0 and found.topk_ids is None
