"""A run on simulated devices that engines join while it goes on: tokens a second before and after.

    serve (an agent for each simulated host) <-> Agents, SimulatedHosts -> Lifecycle, Elastic: as in a run on hosts

Launcher and learner are on the first host, the teacher and the first student engines on one each, and each host that
joins brings a student engine and a rollout actor that drives it. All hosts are this machine: engines only take time, so
that they share its processors as one would have them to itself.
"""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from opd_async.bench.agents import DEADLINE_S, FACE, KEYS, VERSIONS, serve
from opd_async.bench.crosscheck.__main__ import WARMUP, Asked, engine_command, made_up_inputs, settings, simulated
from opd_async.bench.crosscheck.scenario import Scenario
from opd_async.cluster.agents import Agents
from opd_async.cluster.hosting import Supervise, alone, share_files
from opd_async.cluster.hosts import Hosts
from opd_async.cluster.supervisor import ProcessSpec, Supervising
from opd_async.config.clustering import ClusterSection
from opd_async.config.topology import Topology
from opd_async.data.jsonl import read_jsonl
from opd_async.errors import DeadlineError
from opd_async.plan.free_ports import free_ports
from opd_async.plan.resolve import Site, make_plan, ports_wanted
from opd_async.run.lifecycle import Lifecycle
from opd_async.run.run_folder import prepare
from opd_async.signals import Signals
from opd_async.telemetry.report import METRICS_FILE

NEVER = 10**6
LOOK_S = 0.2
TAKES_PART = " takes part with "


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What a run does with so many engines."""

    engines: int
    tokens_per_s: float
    """Virtual."""
    joined_s: float
    """Seconds from the start of the agents that brought it to so many until the last of them took part."""


class SimulatedHosts(Hosts):
    """As `Hosts`, with a simulated student engine wherever a host that has joined would start a real one."""

    def __init__(self, scenario: Scenario, *rest: Any, **others: Any) -> None:
        super().__init__(*rest, **others)
        self._scenario = scenario

    async def start(self, spec: ProcessSpec) -> None:
        """As `Hosts.start`."""
        joined = "opd_async.actors.engine.server" in spec.command
        words = engine_command(self._scenario, "student", spec.command) if joined else spec.command
        await super().start(dataclasses.replace(spec, command=words))


class Growth:
    """Has hosts join once the run has shown what it does without them, and ends it in the end."""

    def __init__(self, section: ClusterSection, scenario: Scenario, steps: int, rows: Path, end: Callable[[], None]):
        """`steps` optimizer steps, of which `WARMUP` are a warm-up, are each phase; `end` ends the run."""
        self._section, self._scale, self._steps, self._rows, self._end = section, scenario.scale, steps, rows, end
        self._hosts = section.nodes - 1
        self._taking_part = 0
        self._news = asyncio.Event()
        self.phases: list[Phase] = []

    def heard(self, line: str) -> None:
        """Take a line of the run."""
        print(line, flush=True)
        self._taking_part += TAKES_PART in line
        self._news.set()

    async def grow(self, numbers: Sequence[int], start: Callable[[Sequence[str]], None]) -> None:
        """Go through all `numbers` of engines; `start` starts agents. On cancel: hosts may have joined."""
        engines, joined_s = numbers[0], 0.0
        for number in numbers:
            if number > engines:
                names = [f"h{self._hosts + 1 + i}" for i in range(number - engines)]
                began, wanted = time.monotonic(), self._taking_part + len(names)
                start(names)
                await self._take_part(names, wanted)
                engines, joined_s, self._hosts = number, time.monotonic() - began, self._hosts + len(names)
            self.phases.append(await self._measured(engines, joined_s))
        self._end()

    async def _take_part(self, names: Sequence[str], wanted: int) -> None:
        """Wait until hosts have joined; `DeadlineError` with their names when they do not."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while self._taking_part < wanted:
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            missing = wanted - self._taking_part
            raise DeadlineError(
                f"{missing} of {', '.join(names)} have not joined in {DEADLINE_S:.0f} s; the lines above say why"
            ) from None

    async def _measured(self, engines: int, joined_s: float) -> Phase:
        """The next steps, behind a warm-up."""
        first = await self._after(len(self._done()) + WARMUP)
        rows = await self._after(len(first) + self._steps - WARMUP)
        counted = rows[len(first) :]
        seconds = (rows[-1]["time"] - first[-1]["time"]) * self._scale
        return Phase(engines=engines, tokens_per_s=sum(row["tokens"] for row in counted) / seconds, joined_s=joined_s)

    async def _after(self, count: int) -> list[dict[str, Any]]:
        """The first `count` steps; a run that does not get there ends itself, and this with it."""
        while True:
            if len(rows := self._done()) >= count:
                return rows[:count]
            await asyncio.sleep(LOOK_S)

    def _done(self) -> list[dict[str, Any]]:
        return list(read_jsonl(self._rows)) if self._rows.exists() else []


@contextmanager
def agents_of(section: ClusterSection) -> Iterator[Callable[[Sequence[str]], None]]:
    """What starts agents for hosts of some names, in a process of their own, which ends with the block."""
    context = multiprocessing.get_context("spawn")
    processes = []

    def start(names: Sequence[str]) -> None:
        process = context.Process(target=serve, args=(section, list(names)))
        process.start()
        processes.append(process)

    try:
        yield start
    finally:
        for process in processes:
            process.join(30.0)
            process.kill()


def growing_topology(scenario: Scenario, asked: Asked, folder: Path, numbers: Sequence[int]) -> Topology:
    """A topology that begins with the first of these numbers of engines and has the sizes of a run with the last."""
    values = settings(scenario, dataclasses.asdict(asked) | {"steps": NEVER}, folder)
    first, last = numbers[0], numbers[-1]
    values["engines"]["student"] |= {"replicas": first}
    values["rollout"]["slots"] = values["rollout"]["slots"] * first // last
    (port,) = free_ports(FACE.address, 1)
    cluster = {"backend": "agents", "nodes": 2 + first, "spare_nodes": last - first, "slots_per_node": 1}
    values["cluster"] = cluster | {"port": port, "join_s": DEADLINE_S}
    return Topology.model_validate(values)


def run(scenario: Scenario, asked: Asked, folder: Path, numbers: Sequence[int]) -> list[Phase]:
    """Run with each of these numbers of engines, one after the other; `scenario` has the last of them."""
    topology = growing_topology(scenario, asked, folder, numbers)
    section, stop_s = topology.cluster, topology.supervisor.stop_deadline_s
    names = ["", *(f"h{number}" for number in range(1, section.nodes))]
    with ExitStack() as stack:
        ports = tuple(tuple(free_ports(FACE.address, count, stack)) for count in ports_wanted(topology))
        site = Site(names=tuple(names), addresses=(FACE.address,) * section.nodes, ports=ports)
        plan = simulated(make_plan(topology, stack, site), scenario)
        path = stack.enter_context(prepare(plan)).path
        start = stack.enter_context(agents_of(section))
        signals = Signals()
        growth = Growth(section, scenario, asked.steps, path / METRICS_FILE, signals.arrived)

        async def whole() -> None:
            start(names[1:])
            async with Agents(section, stop_s, KEYS, FACE, VERSIONS, say=growth.heard) as agents:
                await agents.gather()
                where = {role.name: role.node for role in plan.roles}
                lifecycle = Lifecycle(
                    *(plan, made_up_inputs(topology), growth.heard, signals),
                    supervise=_supervise(scenario, agents, where, topology),
                )
                async with asyncio.TaskGroup() as group:
                    growing = group.create_task(growth.grow(numbers, start), name="grow")
                    await lifecycle.run()
                    growing.cancel()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(whole())
    return growth.phases


def _supervise(scenario: Scenario, agents: Agents, where: dict[str, str], topology: Topology) -> Supervise:
    def supervise(
        echo: Callable[[str], None], stop_deadline_s: float, on_unwritten: Callable[[int], None]
    ) -> AbstractAsyncContextManager[Supervising]:
        return SimulatedHosts(
            *(scenario, agents, alone(echo, stop_deadline_s, on_unwritten)),
            where=where,
            environment={},
            own_environment=FACE.environment,
            node_back_s=topology.cluster.node_back_s,
            share=lambda node: share_files(topology, agents, [node], echo),
            echo=echo,
            on_unwritten=on_unwritten,
        )

    return supervise
