"""A launcher of processes that only sleep, one on each host of a lab: hosts, leases and fences without a run.

    python tests/cluster/sleepers.py FOLDER NODES FENCE_S LOST_S

It prints what happens, starts again whatever ends, and stops everything in order once FOLDER holds a file `stop`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path

from opd_async.cluster.agents import Agents
from opd_async.cluster.hosting import alone, versions
from opd_async.cluster.hosts import Hosts
from opd_async.cluster.interfaces import own_face
from opd_async.cluster.nodes import Node
from opd_async.cluster.secret import take_secret
from opd_async.cluster.supervisor import ProcessSpec
from opd_async.config.clustering import Backend, ClusterSection
from opd_async.keys import INCARNATION_ENV, new_incarnation

SLEEP = "import time; time.sleep(3600)  # one that only sleeps"


def say(line: str) -> None:
    """Print at once, with the time, as agents do."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


async def no_files(node: Node) -> None:
    """Sleepers need none."""


async def main(folder: Path, nodes: int, fence_s: float, lost_s: float) -> None:
    """Start, watch, start again, stop."""
    cluster = ClusterSection(
        backend=Backend.AGENTS, nodes=nodes, fence_s=fence_s, lost_s=lost_s, node_back_s=3600, join_s=3600
    )
    face = own_face(None)
    async with Agents(cluster, 30.0, take_secret(), face, versions(), say=say) as agents:
        hosts_of = {f"on-{node.name}": node.name for node in await agents.gather()} | {"here": ""}
        hosts = Hosts(
            agents,
            alone(say, 30.0, lambda lines: None),
            where=hosts_of,
            environment={},
            own_environment=face.environment,
            node_back_s=3600,
            share=no_files,
            echo=say,
            on_unwritten=lambda lines: None,
        )

        async def start(name: str) -> None:
            env = {INCARNATION_ENV: new_incarnation()}
            await hosts.start(ProcessSpec(name, (sys.executable, "-c", SLEEP), env, folder / f"{name}.log"))
            say(f"started {name}")

        async with hosts, asyncio.TaskGroup() as group:
            restarts = group.create_task(_restart(hosts, start, group))
            for name in hosts_of:
                await start(name)
            await asyncio.to_thread(_wait_for, folder / "stop")
            restarts.cancel()
            await hosts.stop_all((tuple(hosts_of),))
            say("stopped everything")


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.2)


async def _restart(hosts: Hosts, start: object, group: asyncio.TaskGroup) -> None:
    with suppress(asyncio.CancelledError):
        while True:
            ended = await hosts.exits.get()
            say(f"ended {ended.name}: {ended.code} {' '.join(ended.tail[-1:])}")
            group.create_task(start(ended.name))  # type: ignore[operator]


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])))
