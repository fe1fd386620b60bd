"""A learner without a model: it takes the time of each step and of each weight update, and trains nothing.

    intake (ROUTER) -> DEALER -> Train: sleep | SyncWeights: POST to the engines | SaveCheckpoint | Stop
                                   LearnerReply -> dispatcher

    python -m bench.crosscheck.learner --plan runs/<name>/plan.json [options of a scenario]

    loop     waits for                 unblocked by
    obey     a command of the intake   the intake

On cancel: the step under way is dropped.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import zmq.asyncio

from opd_async.bench.crosscheck.scenario import Scenario, add_arguments
from opd_async.bench.no_weights import save_no_weights
from opd_async.errors import RoleError
from opd_async.forecast.cost_model import TrainCost
from opd_async.keys import incarnation
from opd_async.plan.plan import Plan, RoleKind
from opd_async.process import run_role
from opd_async.role import read_plan
from opd_async.transport import messages as m
from opd_async.transport.channels import ControlClient
from opd_async.transport.door import Passport

UPDATE_DEADLINE_S = 60.0


def step_seconds(cost: TrainCost, command: m.Train) -> float:
    """Virtual seconds of a step: every sequence forwarded and backward, the LM head on trained rows."""
    lengths = command.sequence_lengths.astype(np.float64)
    forwarded = float((lengths * cost.token_s + cost.pairs.seconds(lengths)).sum())
    return cost.floor_s + forwarded + cost.row_s * len(command.rows)


class SimulatedLearner:
    """One rank of a learner."""

    def __init__(self, plan: Plan, scenario: Scenario, session: aiohttp.ClientSession) -> None:
        self._scenario, self._session = scenario, session
        self._cost = scenario.workload().train
        context = zmq.asyncio.Context()
        self._name = plan.role(RoleKind.LEARNER, 0).name
        self._commands = ControlClient(context, plan.batches[0], "rank-0", passport=Passport.of_environment("rank-0"))
        self._replies = ControlClient(context, plan.control, self._name, passport=Passport.of_environment(self._name))
        self._version = 0

    async def obey(self) -> None:
        """Commands until Stop."""
        hello = m.Hello(self._name, incarnation())
        await self._commands.send(hello)
        await self._replies.send(hello)
        spent = {"idle_s": 0.0, "seconds": 0.0}
        while True:
            asked = time.monotonic()
            command = await self._commands.receive()
            waited_s = time.monotonic() - asked
            match command:
                case m.Train():
                    seconds = step_seconds(self._cost, command) / self._scenario.scale
                    await asyncio.sleep(seconds)
                    spent = {"idle_s": spent["idle_s"] + waited_s, "seconds": spent["seconds"] + seconds}
                    if not command.last:
                        await self._commands.send(m.PartDone(command.version, command.part))
                        continue
                    self._version = command.version + 1
                    await self._reply("Train", spent)
                    spent = dict.fromkeys(spent, 0.0)
                case m.SyncWeights():
                    async with asyncio.TaskGroup() as group:
                        for url in command.engines:
                            group.create_task(self._update(url), name=f"update {url}")
                    await self._reply("SyncWeights", {})
                case m.SaveCheckpoint():
                    written = await asyncio.to_thread(save_no_weights, Path(command.folder))
                    await self._reply("SaveCheckpoint", written)
                case m.Stop():
                    return
                case _:
                    raise RoleError(f"a simulated learner cannot do {type(command).__name__}")

    async def _reply(self, command: str, stats: dict[str, float]) -> None:
        await self._replies.send(m.LearnerReply(command, self._version, None, stats))

    async def _update(self, url: str) -> None:
        """Have an engine take the time of a weight update, and name its weights."""
        body: dict[str, Any] = {
            "model_path": "nowhere",
            "weight_version": str(self._version),
            "flush_cache": False,
        }
        timeout = aiohttp.ClientTimeout(total=UPDATE_DEADLINE_S)
        async with self._session.post(f"{url}/update_weights_from_disk", json=body, timeout=timeout) as response:
            if response.status != 200:
                raise RoleError(f"{url}: refused an update: {await response.text()}")

    def close(self) -> None:
        """Close the sockets; answers may still leave."""
        self._commands.close()
        self._replies.close()


async def main() -> None:
    """Run until the intake says stop."""
    parser = argparse.ArgumentParser(description="A learner that only takes time.")
    parser.add_argument("--plan", type=Path, required=True)
    add_arguments(parser)
    options = parser.parse_args()
    plan = read_plan(options.plan)
    headers = {"Authorization": f"Bearer {plan.topology.engines.student.admin_api_key}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        learner = SimulatedLearner(plan, Scenario.of(options), session)
        try:
            await learner.obey()
        finally:
            learner.close()


if __name__ == "__main__":
    run_role(main)
