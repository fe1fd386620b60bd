"""A host that leaves a run at a weight update: its processes end together, and one that nothing ends ends no run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deadlines import patience
from plans_on_hosts import nodes_of, on_hosts, plan_of

from opd_async.cluster.nodes import Node
from opd_async.errors import DeadlineError
from opd_async.plan.plan import RoleKind
from opd_async.run.elastic import Elastic
from opd_async.run.leaving import ANSWER, FOLDER, Request, requests

SIZES = ("engines.student.replicas=6", "rollout.replicas=4")
"""On hosts of two slots: two have two student engines each, with an actor of their own."""


class Run:
    """A run on four hosts whose processes end when the test lets them."""

    def __init__(self, folder: Path) -> None:
        self.plan = plan_of(on_hosts(folder, 4, 2, *SIZES))
        self.host = nodes_of(self.plan, RoleKind.ROLLOUT)[1]
        self.mine = [role.name for role in self.plan.roles if role.node == self.host]
        self.stuck, self.stopping = set[str](), set[str]()
        self.all_engines = asyncio.Event()
        """Both engines of the host are ending."""
        self.left: list[str] = []
        self.said: list[str] = []
        self.dismissed: list[str] = []
        self.fleet = SimpleNamespace(
            away=set(), left=set(), say=self.said.append, supervisor=SimpleNamespace(stop=self._stop)
        )
        self.deaths = SimpleNamespace(keep_down=self._keep_down, leave=self._leave)
        names = sorted({role.node for role in self.plan.roles} - {""})
        agents = SimpleNamespace(nodes={name: self._node(name) for name in names}, dismiss=self._dismiss)
        hosts: Any = SimpleNamespace(agents=agents)
        dispatcher: Any = self
        self.elastic = Elastic(dispatcher, hosts, lambda plan: None)

    def _node(self, name: str) -> Node:
        node = Node(name=name, address="", incarnation="", route=b"", heard=0.0)
        node.there.set()
        return node

    def up(self, kind: RoleKind) -> list[str]:
        return [role.name for role in self.plan.of_kind(kind)]

    def resize(self) -> None:
        self.said.append("resized")

    async def _keep_down(self, name: str) -> None:
        assert name not in self.stopping

    async def _leave(self, name: str) -> None:
        self.left.append(name)

    async def _stop(self, name: str) -> None:
        self.stopping.add(name)
        if len([engine for engine in self.stopping if engine.startswith("student-engine")]) == 2:
            self.all_engines.set()
        if name.startswith("student-engine"):
            await self.all_engines.wait()
        if name in self.stuck:
            raise DeadlineError(f"{name} (pid 7) is still there 32 s after SIGKILL: it hangs inside the kernel")

    async def _dismiss(self, node: Node, reason: str) -> None:
        self.dismissed.append(node.name)

    async def drain(self) -> tuple[bool, str]:
        """`opd drain` of the host at a weight update: what it is answered."""
        folder = self.plan.run_folder / FOLDER
        folder.mkdir(parents=True)
        (folder / self.host).touch()
        assert requests(self.plan.run_folder) == [Request(self.host, False)]
        async with asyncio.timeout(patience(20)):
            await self.elastic.let_go()
        found = json.loads((folder / f"{self.host}{ANSWER}").read_text())
        return found["done"], found["text"]


async def test_the_engines_of_a_host_end_together_behind_its_actor(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert len(run.mine) == 3 and run.mine[-1] == "rollout-1"
    assert await run.drain() == (True, f"{run.host} has left the run; its agent has ended")
    assert run.left[0] == "rollout-1" and sorted(run.left) == sorted(run.mine) and run.dismissed == [run.host]
    assert run.fleet.away == run.fleet.left == set(run.mine)


async def test_a_process_that_nothing_ends_does_not_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    engine = run.mine[0]
    run.stuck.add(engine)
    done, text = await run.drain()
    assert done and text == f"{run.host} has left the run, but {engine} cannot be ended there; switch it off and on"
    assert sorted(run.left) == sorted(run.mine) and run.dismissed == [run.host]
    assert run.said[0].startswith(f"going on without {engine}: {engine} (pid 7) is still there 32 s after SIGKILL")


async def test_a_run_takes_requests_until_it_is_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    folder = run.plan.run_folder / FOLDER
    folder.mkdir(parents=True)
    (folder / run.host).touch()  # somebody asked an earlier launch
    run.elastic.begin()
    assert folder.is_dir() and requests(run.plan.run_folder) == []
    run.elastic.end()
    assert not folder.exists()
