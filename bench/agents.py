"""A launcher and many agents: seconds until all have joined and run a process, and what their beats cost it.

    python -m bench.agents [--agents 1 8 32 128] [--processes 1] [--seconds 10] [--json FILE]

    Agent (real, one for each simulated host) <-- CURVE, loopback --> Agents, Hosts (a launcher's) -> `sleep` on each

The agents live in one process beside the launcher's in another, so that its processor time is its own. Their hosts are
simulated: all are this machine, whose processors start every process. What a host needs to load a model and to connect
is not in it: `python tests/cluster` has whole runs.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import uvloop

from opd_async.cluster.agent import Agent
from opd_async.cluster.agents import Agents
from opd_async.cluster.hosts import Hosts
from opd_async.cluster.interfaces import Face
from opd_async.cluster.nodes import Node
from opd_async.cluster.service import HostFacts
from opd_async.cluster.supervisor import ProcessSpec, Supervisor
from opd_async.config.clustering import Backend, ClusterSection
from opd_async.files import write_atomically
from opd_async.keys import RunKeys
from opd_async.plan.free_ports import free_ports

FACE = Face("lo", "127.0.0.1")
KEYS = RunKeys("a secret of", "the bench", "alone")
VERSIONS = {"opd_async": "1"}
DEADLINE_S = 600.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of agents."""

    agents: int
    joined_s: float
    """From the launcher's first moment to the last agent's welcome."""
    started_s: float
    """From then until all processes run on every host."""
    start_cpu_s: float
    """Processor seconds of the launcher for both."""
    beats_cpu: float
    """Processor seconds of the launcher in a second, while nothing happens but beats."""
    stopped_s: float
    """Until all of these have ended."""


def serve(section: ClusterSection, names: Sequence[str]) -> None:
    """An agent for each host of these names, until the launcher lets them go."""

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as group:
            for name in names:
                facts = HostFacts(name=name, face=FACE, gpus=8, cores=64, versions=VERSIONS)
                agent = Agent(f"127.0.0.1:{section.port}", KEYS, facts, DEADLINE_S, lambda line: None)
                group.create_task(agent.run())

    uvloop.run(all_of_them())


async def no_files(node: Node) -> None:
    """These processes share none. On cancel: nothing has changed."""


async def lead(section: ClusterSection, processes: int, seconds: float, folder: Path) -> Row:
    """The launcher's side, with so many processes on each host. On cancel: every process is stopped."""
    began, began_cpu = time.monotonic(), time.process_time()
    async with Agents(section, 20.0, KEYS, FACE, VERSIONS, say=lambda line: None) as agents:
        names = [node.name for node in await agents.gather()]
        joined = time.monotonic()
        where = {f"role-{name}-{number}": name for name in names for number in range(processes)}
        local = Supervisor(lambda line: None, 20.0)
        async with Hosts(
            agents,
            local,
            where=where,
            environment={},
            own_environment={},
            node_back_s=DEADLINE_S,
            share=no_files,
            echo=lambda line: None,
            on_unwritten=lambda lines: None,
        ) as hosts:

            async def start_on(host: str) -> None:
                for role in (role for role, its_host in where.items() if its_host == host):
                    await hosts.start(ProcessSpec(role, ("sleep", "600"), {}, folder / f"{role}.log"))

            async with asyncio.TaskGroup() as group:  # as `Fleet.start_all`
                for name in names:
                    group.create_task(start_on(name))
            started, cpu = time.monotonic(), time.process_time()
            start_cpu_s = cpu - began_cpu
            await asyncio.sleep(seconds)
            cpu = time.process_time() - cpu
            stopping = time.monotonic()
            await hosts.stop_all((tuple(where),))
            stopped = time.monotonic()
    return Row(
        agents=len(names),
        joined_s=joined - began,
        started_s=started - joined,
        start_cpu_s=start_cpu_s,
        beats_cpu=cpu / seconds,
        stopped_s=stopped - stopping,
    )


def measure(count: int, processes: int, seconds: float, folder: Path) -> Row:
    """One row: the agents in a process of their own."""
    (port,) = free_ports("127.0.0.1", 1)
    section = ClusterSection(backend=Backend.AGENTS, nodes=count + 1, port=port, join_s=DEADLINE_S)
    context = multiprocessing.get_context("spawn")
    others = context.Process(target=serve, args=(section, [f"h{number + 1}" for number in range(count)]))
    others.start()
    try:
        return uvloop.run(lead(section, processes, seconds, folder))
    finally:
        others.join(30.0)
        others.kill()


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| agents | all joined, s | all processes run, s | launcher's CPU s for both | launcher's CPU s in a second of "
        "beats | all stopped, s |"
    ]
    lines.append("|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        times = (row.joined_s, row.started_s, row.start_cpu_s, row.beats_cpu, row.stopped_s)
        lines.append(f"| {row.agents} | " + " | ".join(f"{seconds:.2f}" for seconds in times) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.agents", description="A launcher and many agents.")
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--processes", type=int, default=1, help="on each host; a node of eight GPUs has about nine")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to listen to nothing but beats")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as name:
        rows = [measure(count, options.processes, options.seconds, Path(name)) for count in options.agents]
    print(table(rows))
    if options.json is not None:
        write_atomically(options.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=2).encode())


if __name__ == "__main__":
    main()
