"""Ray's side of `backend: ray`, in a process of its own: find nodes, and keep a command on each of them.

    launcher (`ray_nodes.py`) -> lines of JSON on stdin  -> Ray -> an actor on each node -> its agent
                              <- lines of JSON on stdout <-

    python -P ray_driver.py   under any Python that has Ray of the cluster's version: it needs nothing of this project

    asked                                                     answered
    {"hosts": {}, "bundles": [{"GPU": 8}, ..], "wait_s": 600}   {"connected": true}, {"say": text} .., then
                                                                {"hosts": {name: address, ..}}
    {"hosts": {name: address, ..}, ..}                          the same hosts, which an earlier process has found
    {"start": 1, "host": name, "command": .., ..}               {"ended": 1, "code": .., "lines": ..} at its end
    {"stop": 1}                                                 the same

The first bundle is for the launcher's own node, and so is the first host. {"error": text} ends this process. No actor
is detached, so that its end, and the end of its stdin, is the end of every agent.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

SAY_EVERY_S = 10.0
KNOCK_S = 10.0
LINE_BYTES = 1 << 20
HERE = 0.001
"""What is asked for of `node:ADDRESS`, a resource of 1 that every node has: enough to be on that node."""
Answer = Callable[[dict[str, Any]], None]


class NodesError(Exception):
    """Ray cannot give what was asked for."""


class Leash:
    """An actor that keeps a command on its node. The command is started by its main thread, and ends with it."""

    def run(self, command: list[str], environment: dict[str, str], folder: str) -> tuple[int, list[str]]:
        """Run a command to its end; returns its exit code and last lines."""
        lines: deque[str] = deque(maxlen=6)
        mine = {**os.environ, **environment, "OPD_PARENT_PID": str(os.getpid())}
        try:
            child = subprocess.Popen(
                command,
                cwd=folder,
                env=mine,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return 127, [str(error)]
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)  # into Ray's log of this actor
            lines.append(line.rstrip())
        return child.wait(), list(lines)


class Nodes:
    """The nodes of a Ray cluster that the run is on."""

    def __init__(self, ray: Any, answer: Answer) -> None:
        self._ray = ray
        self._answer = answer
        self._hosts: dict[str, str] = {}
        self._bundles: list[dict[str, float]] = []
        self._group: Any = None
        self._leash = ray.remote(max_restarts=0, num_cpus=0)(Leash)
        self._leashes: dict[int, Any] = {}

    def find(self, request: dict[str, Any]) -> dict[str, str]:
        """The address of each host by its name, the launcher's first; places the bundles where no host is known yet.

        Raises `NodesError`, after `wait_s`, with what the cluster has.
        """
        self._bundles, self._hosts = request["bundles"], request["hosts"]
        if not self._hosts:
            self._hosts = self._place(request["wait_s"])
        return self._hosts

    def _place(self, wait_s: float) -> dict[str, str]:
        ray, began = self._ray, time.monotonic()
        mine = ray.get_runtime_context().get_node_id()
        own = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == mine)
        bundles = [{**bundle, f"node:{own}": HERE} if i == 0 else bundle for i, bundle in enumerate(self._bundles)]
        self._group = ray.util.placement_group(bundles, strategy="STRICT_SPREAD")
        while not self._group.wait(timeout_seconds=min(SAY_EVERY_S, wait_s)):
            waited = time.monotonic() - began
            if waited >= wait_s:
                raise NodesError(
                    f"cluster.nodes: {len(bundles)}, and in {waited:.0f} s Ray has not found room on so many nodes; "
                    f"{self._there()}; write fewer nodes, or see `ray status`"
                )
            self._answer({"say": f"waiting for room on {len(bundles)} nodes after {waited:.0f} s; {self._there()}"})
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        where = ray.util.placement_group_table(self._group)["bundles_to_node_id"]
        found = [nodes[where[index]] for index in range(len(bundles))]
        hosts = {node["NodeManagerHostname"]: node["NodeManagerAddress"] for node in found}
        if len(hosts) < len(found):
            names = ", ".join(sorted(f"{node['NodeManagerHostname']} {node['NodeManagerAddress']}" for node in found))
            raise NodesError(f"cluster.nodes: two nodes of the Ray cluster have one hostname ({names}); rename one")
        return hosts

    def _there(self) -> str:
        """What each bundle asks for, and what the cluster has, in words."""
        wanted = " and ".join(_amount(bundle) or "a place" for bundle in self._bundles[-1:])
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        has = ", ".join(f"{node['NodeManagerHostname']} ({_amount(node['Resources']) or 'nothing'})" for node in alive)
        free = _amount(self._ray.available_resources()) or "nothing"
        return f"each is to give {wanted}, and the cluster has {len(alive)} nodes, {has}, of which {free} is free"

    async def keep(self, request: dict[str, Any]) -> None:
        """Run a command on a host and answer with its end. On cancel: it ends with this process."""
        number = request["start"]
        try:
            leash = self._leashes[number] = self._leash.options(**self._on(request["host"])).remote()
            code, lines = await leash.run.remote(request["command"], request["environment"], request["folder"])
        except Exception as error:  # the edge of Ray: whatever it raises is the end of this command
            code, lines = 1, [f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"]
        self._leashes.pop(number, None)
        self._answer({"ended": number, "code": code, "lines": lines})

    def _on(self, name: str) -> dict[str, Any]:
        """Options that have an actor on this host: in its bundle, or beside it where Ray has moved that to another."""
        strategies = self._ray.util.scheduling_strategies
        index = list(self._hosts).index(name)
        options = {"num_gpus": self._bundles[index].get("GPU", 0)}
        if self._group is not None:
            nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes() if node["Alive"]}
            where = self._ray.util.placement_group_table(self._group)["bundles_to_node_id"]
            if nodes.get(where.get(index)) == self._hosts[name]:
                inside = strategies.PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
                return {**options, "scheduling_strategy": inside}
        return {**options, "resources": {f"node:{self._hosts[name]}": HERE}}

    def stop(self, number: int) -> None:
        """End an actor, and with it the command: by the kernel."""
        if number in self._leashes:
            self._ray.kill(self._leashes[number])


def _amount(resources: dict[str, float]) -> str:
    found = {kind: resources[kind] for kind in ("GPU", "CPU") if resources.get(kind)}
    return " and ".join(f"{count:g} {kind}" for kind, count in found.items())


async def obey(nodes: Nodes, lines: asyncio.StreamReader) -> None:
    """Do what the lines ask for until they end. On cancel: as at their end."""
    kept: set[asyncio.Task[None]] = set()
    while line := await lines.readline():
        request = json.loads(line)
        if "stop" in request:
            nodes.stop(request["stop"])
            continue
        task = asyncio.create_task(nodes.keep(request))
        kept.add(task)
        task.add_done_callback(kept.discard)
    for task in kept:
        task.cancel()


async def serve(ray: Any, answer: Answer) -> None:
    """Find the nodes, then serve. Raises `NodesError`. On cancel: every actor ends with this process."""
    lines = asyncio.StreamReader(LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    request = json.loads(await lines.readline())
    try:
        _knock(os.environ.get("RAY_ADDRESS", ""))
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # whatever Ray says of a cluster that is not there, or has another version
        raise NodesError(
            f"no Ray cluster can be used from here ({' '.join(str(error).split())[:300]}); start the launcher by `ray "
            "job submit`, or on a node of a cluster"
        ) from None
    nodes = Nodes(ray, answer)
    answer({"connected": True})
    answer({"hosts": nodes.find(request)})
    await obey(nodes, lines)


def _knock(place: str) -> None:
    """Raise `OSError` where nobody listens at RAY_ADDRESS: Ray itself would try for minutes."""
    if place.startswith("ray://"):
        raise OSError("RAY_ADDRESS: ray:// is a client's, and the launcher has to be on a node of the cluster")
    host, _, port = place.rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), KNOCK_S).close()
        except OSError as error:
            raise OSError(f"RAY_ADDRESS: {place} does not answer: {error}") from None


def main() -> int:
    """Speak to the launcher; returns the exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer

    def answer(words: dict[str, Any]) -> None:
        print(json.dumps(words), file=answers, flush=True)

    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ImportError as error:
        answer(
            {
                "error": f"{sys.executable} has no Ray ({error}); pip install 'opd_async[ray]', or name a Python that "
                "has it (cluster.ray_python)"
            }
        )
        return 2
    try:
        asyncio.run(serve(ray, answer))
    except NodesError as error:
        answer({"error": str(error)})
        return 2
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
