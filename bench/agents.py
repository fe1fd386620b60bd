"""A launcher and many agents: seconds until all have joined and run a process, and what their beats cost it.

    python -m bench.agents [--agents 1 8 32 128] [--seconds 10] [--json FILE]

    Agent (real, one for each simulated host) <-- CURVE, loopback --> Agents, Hosts (a launcher's) -> `sleep` on each

The agents live in one process beside the launcher's in another, so that its processor time is its own. Their hosts are
simulated: all are this machine. What a host needs to load a model and to connect is not in it: `python tests/cluster`
has whole runs.
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
    """From then until a process runs on every host."""
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


async def lead(section: ClusterSection, count: int, seconds: float, folder: Path) -> Row:
    """The launcher's side. On cancel: every process is stopped."""
    began = time.monotonic()
    async with Agents(section, 20.0, KEYS, FACE, VERSIONS, say=lambda line: None) as agents:
        names = [node.name for node in await agents.gather()]
        joined = time.monotonic()
        local = Supervisor(lambda line: None, 20.0)
        async with Hosts(
            agents,
            local,
            where={f"role-{name}": name for name in names},
            environment={},
            own_environment={},
            node_back_s=DEADLINE_S,
            echo=lambda line: None,
            on_unwritten=lambda lines: None,
        ) as hosts:
            specs = [ProcessSpec(f"role-{name}", ("sleep", "600"), {}, folder / f"{name}.log") for name in names]
            async with asyncio.TaskGroup() as group:
                for spec in specs:
                    group.create_task(hosts.start(spec))
            started, cpu = time.monotonic(), time.process_time()
            await asyncio.sleep(seconds)
            cpu = time.process_time() - cpu
            stopping = time.monotonic()
            async with asyncio.TaskGroup() as group:
                for spec in specs:
                    group.create_task(hosts.stop(spec.name))
            stopped = time.monotonic()
    return Row(
        agents=count,
        joined_s=joined - began,
        started_s=started - joined,
        beats_cpu=cpu / seconds,
        stopped_s=stopped - stopping,
    )


def measure(count: int, seconds: float, folder: Path) -> Row:
    """One row: the agents in a process of their own."""
    (port,) = free_ports("127.0.0.1", 1)
    section = ClusterSection(backend=Backend.AGENTS, nodes=count + 1, port=port, join_s=DEADLINE_S)
    context = multiprocessing.get_context("spawn")
    others = context.Process(target=serve, args=(section, [f"h{number + 1}" for number in range(count)]))
    others.start()
    try:
        return uvloop.run(lead(section, count, seconds, folder))
    finally:
        others.join(30.0)
        others.kill()


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| agents | all joined, s | a process on each, s | launcher's CPU s in a second of beats | all stopped, s |"
    ]
    lines.append("|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = (f"{row.joined_s:.2f}", f"{row.started_s:.2f}", f"{row.beats_cpu:.2%}", f"{row.stopped_s:.2f}")
        lines.append(f"| {row.agents} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.agents", description="A launcher and many agents.")
    parser.add_argument("--agents", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to listen to nothing but beats")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as name:
        rows = [measure(count, options.seconds, Path(name)) for count in options.agents]
    print(table(rows))
    if options.json is not None:
        write_atomically(options.json, json.dumps([dataclasses.asdict(row) for row in rows], indent=2).encode())


if __name__ == "__main__":
    main()
