"""A learner that is down while its hosts come and go: what is planned, written, said and left alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plans_on_hosts import nodes_of, on_hosts, plan_of

from opd_async.cluster.nodes import HostLostError
from opd_async.files import write_atomically
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import PLAN_FILE
from opd_async.run.learner_hosts import LearnerHosts
from opd_async.run.lifecycle import Lifecycle
from opd_async.signals import Signals
from opd_async.telemetry.exporter import RoleMetrics

LATE = HostLostError("h1 has not come back in 5 s")


class Run:
    """Of a run, what its learner's hosts look at."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.plans = plan, list[Plan]()
        self.said, self.kept_down, self.placed = list[str](), list[str](), dict[str, str]()
        self.loses = list[str]()
        """Hosts that are lost when a process has started."""
        self.deaths = SimpleNamespace(keep_down=self.keep_down)
        self.metrics = RoleMetrics("launcher")
        self.nodes = {
            name: SimpleNamespace(there=asyncio.Event()) for name in {role.node for role in plan.roles} - {""}
        }
        for node in self.nodes.values():
            node.there.set()
        hosts: Any = SimpleNamespace(agents=SimpleNamespace(nodes=self.nodes), place=self.placed.__setitem__)
        dispatcher: Any = self
        plan.run_folder.mkdir(parents=True)
        write_atomically(plan.run_folder / PLAN_FILE, plan.model_dump_json())
        self.hosts = LearnerHosts(dispatcher, hosts, 5.0, self.plans.append)
        self.log = list[str]()
        supervisor = SimpleNamespace(lost=lambda name: not self.is_there(name), stop=self.stop)
        self.fleet = SimpleNamespace(
            say=self.said.append, away=set(), left=set(), supervisor=supervisor, start=self.start
        )
        self.watch = SimpleNamespace(started=lambda role: None)

    def is_there(self, name: str) -> bool:
        node = next(role.node for role in self.plan.roles if role.name == name)
        return not node or self.nodes[node].there.is_set()

    async def start(self, name: str, env: dict[str, str]) -> None:
        if not self.is_there(name):
            raise LATE
        self.log.append(f"start {name}")
        if self.loses:
            self.nodes[self.loses.pop()].there.clear()

    async def stop(self, name: str) -> None:
        self.log.append(f"stop {name}")

    def forget(self) -> None:
        self.log.append("forget")

    def grow(self, plan: Plan) -> None:
        self.plan = plan

    async def keep_down(self, role: str) -> None:
        self.kept_down.append(role)

    @property
    def saved(self) -> Plan:
        return Plan.model_validate_json((self.plan.run_folder / PLAN_FILE).read_text())


async def test_a_lost_host_is_left_behind_and_taken_back(tmp_path: Path) -> None:
    # h1 has a rank, a student engine and its actor; h2 too
    sizes = ("learner.data_parallel=3", "engines.student.replicas=3", "rollout.replicas=3")
    begun = plan_of(on_hosts(tmp_path, 4, 2, *sizes))
    run = Run(begun)
    beside = [role.name for role in begun.roles if role.node == "h1" and role.kind is not RoleKind.LEARNER]
    assert beside == ["student-engine-2", "rollout-2"]
    run.hosts.take_back()
    await run.hosts.go_on_without(LATE)  # it is there: it came back just now
    assert run.plan == begun and run.said == [] and run.plans == []

    run.nodes["h1"].there.clear()
    await run.hosts.go_on_without(LATE)
    assert nodes_of(run.plan) == [""] and run.plans == [run.plan] and run.saved == run.plan
    assert run.said == [
        "going on without h1, not back in 5 s (cluster.node_back_s): the learner has 2 of 3 ranks, on the launcher's "
        "host"
    ]
    assert run.placed == {"learner-0": ""} and run.metrics["opd_launcher_learner_ranks"]._value.get() == 2
    assert run.fleet.away == run.fleet.left == set(beside) and run.kept_down == beside

    run.hosts.take_back()
    assert len(run.plans) == 1, "it is not there yet"
    run.nodes["h1"].there.set()
    run.hosts.take_back()
    assert run.plan == begun == run.saved and run.placed == {"learner-0": "", "learner-1": "h1"}
    assert run.said[1:] == ["h1 is there again: the learner has 3 of 3 ranks, on the launcher's host, h1"]


async def test_a_learner_that_no_host_can_carry_ends_the_run_with_what_is_missing(tmp_path: Path) -> None:
    begun = plan_of(on_hosts(tmp_path, 4, 1, "learner.pipeline_parallel=2"))
    run = Run(begun)
    run.nodes["h1"].there.clear()
    with pytest.raises(HostLostError) as found:
        await run.hosts.go_on_without(LATE)
    assert str(found.value) == (
        "h1 has not come back in 5 s. No smaller learner can go on without it: a learner takes 2 devices at least "
        "(tensor_parallel 1 x context_parallel 1 x pipeline_parallel 2, those of one tensor-parallel group on one "
        "host), and too few that no engine has are left on the launcher's host"
    )
    assert run.plan == begun == run.saved and run.said == [] and not run.fleet.away


async def test_a_second_loss_takes_who_is_back(tmp_path: Path) -> None:
    begun = plan_of(on_hosts(tmp_path, 6, 1, "learner.data_parallel=3", "cluster.launcher_takes_devices=false"))
    run = Run(begun)
    assert nodes_of(run.plan) == ["h1", "h2", "h3"]
    run.nodes["h1"].there.clear()
    await run.hosts.go_on_without(LATE)
    assert nodes_of(run.plan) == ["h2", "h3"]
    run.nodes["h1"].there.set()
    run.nodes["h3"].there.clear()
    run.hosts.take_back()  # h3, lost just now, is waited for
    assert nodes_of(run.plan) == ["h1", "h2", "h3"]
    await run.hosts.go_on_without(LATE)
    assert nodes_of(run.plan) == ["h1", "h2"] and run.placed["learner-0"] == "h1"
    run.nodes["h1"].there.clear()
    run.nodes["h2"].there.clear()
    with pytest.raises(HostLostError, match="all of the learner's hosts are lost"):
        await run.hosts.go_on_without(LATE)


async def test_a_host_that_is_lost_during_the_start_costs_what_has_started_and_no_more(tmp_path: Path) -> None:
    begun = plan_of(on_hosts(tmp_path, 6, 1, "learner.data_parallel=3", "cluster.launcher_takes_devices=false"))
    run = Run(begun)
    inputs: Any = SimpleNamespace(prompts=SimpleNamespace(prompts=[]))
    lifecycle = Lifecycle(begun, inputs, run.said.append, Signals())
    lifecycle._learner_hosts = run.hosts
    run.hosts._on_plan = lifecycle._grow
    run.nodes["h1"].there.clear()
    run.loses = ["h3"]  # when the first of the two that are left has started
    await lifecycle._bring_up(run, run.fleet)  # type: ignore[arg-type]
    down = [*(f"stop learner-{index}" for index in range(3)), "stop intake-0", "forget"]
    assert run.log == [
        *down,
        *("start learner-0", "stop learner-0", "stop learner-1", "stop intake-0", "forget"),
        *("start learner-0", "start intake-0"),
    ]
    assert nodes_of(run.plan) == ["h2"] == nodes_of(lifecycle._plan)
    assert [line.partition(",")[0] for line in run.said] == ["going on without h1", "going on without h3"]
    targets = (begun.run_folder / "targets.json").read_text()
    assert '"process": "learner-0"' in targets and "10.0.0.2:" in targets
