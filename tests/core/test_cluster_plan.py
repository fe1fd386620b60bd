"""A run on several hosts before it starts: its checks, its plan, and which engines get weights when a host is lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deadlines import patience
from small_runs import small_topology

from opd_async.checks.cluster import cluster_problems
from opd_async.checks.validation import validate
from opd_async.cluster.fleet import Fleet
from opd_async.cluster.supervisor import ProcessSpec
from opd_async.command import launch, parse_arguments
from opd_async.config.topology import Topology
from opd_async.keys import RunKeys
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import Site, make_plan, ports_by_host, ports_wanted
from opd_async.run.scraping import scrape_labels, scrape_targets

AGENTS = ("cluster.backend=agents", "cluster.nodes=4", "cluster.slots_per_node=1")
NAMES = ("", "h1", "h2", "h3")
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")


def on_hosts(root: Path, *overrides: str) -> Topology:
    """Two learner ranks, a student and a teacher engine, each on a host of its own."""
    return small_topology(root, *AGENTS, "learner.data_parallel=2", *overrides)


def plan_of(topology: Topology) -> Plan:
    """Its plan on hosts with made-up ports."""
    ports = tuple(
        tuple(range(1000 * host, 1000 * host + count)) for host, count in enumerate(ports_wanted(topology), 1)
    )
    return make_plan(topology, None, Site(names=NAMES, addresses=ADDRESSES, ports=ports))


def test_every_process_has_the_address_and_the_ports_of_its_host(tmp_path: Path) -> None:
    plan = plan_of(on_hosts(tmp_path))
    where = {role.name: (role.node, role.host) for role in plan.roles}
    assert where == {
        "intake-0": ("", "10.0.0.1"),
        "learner-0": ("", "10.0.0.1"),
        "learner-1": ("h1", "10.0.0.2"),
        "student-engine-0": ("h2", "10.0.0.3"),
        "rollout-0": ("h2", "10.0.0.3"),
        "teacher-engine-0": ("h3", "10.0.0.4"),
        "teacher-0": ("h3", "10.0.0.4"),
    }
    for role in plan.roles:
        thousand = 1 + ADDRESSES.index(role.host)
        assert all(port // 1000 == thousand for port in role.ports.values())
    used = [(role.host, port) for role in plan.roles for port in role.ports.values()]
    assert len(set(used)) == len(used)
    assert plan.control == "tcp://10.0.0.1:1000" and plan.launcher_host == "10.0.0.1"
    student = plan.role(RoleKind.STUDENT_ENGINE, 0)
    assert plan.student_engines == (f"http://10.0.0.3:{student.ports['http']}",)
    assert student.command[student.command.index("--host") + 1] == "10.0.0.3"
    assert plan.chunks[0].startswith("tcp://10.0.0.4:") and plan.scored[0].startswith("tcp://10.0.0.1:")
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_every_target_says_role_and_host_and_a_learner_is_one_target(tmp_path: Path) -> None:
    plan = plan_of(on_hosts(tmp_path))
    targets, labels, here = scrape_targets(plan), scrape_labels(plan), socket.gethostname()
    assert "learner-0" in targets and "learner-1" not in targets and labels.keys() >= targets.keys()
    assert targets["rollout-0"].startswith("10.0.0.3:") and targets["launcher"].startswith("10.0.0.1:")
    assert labels["rollout-0"] == {"role": "rollout", "host": "h2"}
    assert labels["teacher-engine-0"]["role"] == "teacher_engine" and labels["teacher-engine-0"]["host"] == "h3"
    assert labels["intake-0"] == {"role": "intake", "host": here}
    agents = {name: address for name, address in targets.items() if name.startswith("agent-")}
    port = plan.topology.cluster.port
    assert agents == {f"agent-h{n}": f"10.0.0.{n + 1}:{port}" for n in (1, 2, 3)}
    assert labels["agent-h2"] == {"role": "agent", "host": "h2"}
    assert labels["launcher"] == {"role": "launcher", "host": here}


def test_a_learner_on_two_hosts_is_a_starter_on_each_that_meet_at_the_first(tmp_path: Path) -> None:
    plan = plan_of(on_hosts(tmp_path))
    first, second = plan.of_kind(RoleKind.LEARNER)
    port = first.ports["master"]
    for number, role in enumerate((first, second)):
        text = " ".join(role.command)
        assert f"--nnodes 2 --log-dir /dev/null --node-rank {number} --nproc-per-node 1 " in text
        assert f"--master-addr 10.0.0.1 --master-port {port} -m" in text
    assert [plan.learner_of(rank) for rank in range(2)] == ["learner-0", "learner-1"]
    with pytest.raises(KeyError, match="no learner rank 2"):
        plan.role_of_rank(2)


def test_explicit_ports_are_counted_over_all_hosts(tmp_path: Path) -> None:
    topology = on_hosts(tmp_path, "network.base_port=30000")
    assert ports_wanted(topology) == [0, 0, 0, 0]
    asked = ports_by_host(topology)
    ports = sorted(port for each in asked for port in each)
    assert asked[0][:2] == [30000, 30001] and ports == list(range(30000, 30000 + len(ports)))
    plan = plan_of(topology)
    for host, address in enumerate(ADDRESSES):
        mine = {port for role in plan.roles if role.host == address for port in role.ports.values()}
        assert mine <= set(asked[host])


def test_weights_go_to_the_engines_of_hosts_that_are_there(tmp_path: Path) -> None:
    plan = plan_of(on_hosts(tmp_path, "cluster.slots_per_node=2", "engines.student.replicas=2"))
    lost: set[str] = set()
    supervisor: Any = SimpleNamespace(lost=lost.__contains__)
    fleet = Fleet(plan, supervisor, print, RunKeys.draw())
    assert fleet.students_to_reach() == list(plan.student_engines)
    lost.add("student-engine-1")
    assert fleet.students_to_reach() == [plan.student_engines[0]]
    lost.add("student-engine-0")  # nothing goes on without any: all are waited for
    assert fleet.students_to_reach() == list(plan.student_engines)


class Slow:
    """A supervisor for whose hosts each start takes until all of them have one under way."""

    def __init__(self, plan: Plan) -> None:
        self._hosts = {role.name: role.node for role in plan.roles}
        self._all_at_it = asyncio.Barrier(len(set(self._hosts.values())))
        self.started: dict[str, list[str]] = {host: [] for host in self._hosts.values()}
        self.order: Sequence[Sequence[str]] = ()

    async def start(self, spec: ProcessSpec) -> None:
        mine = self.started[self._hosts[spec.name]]
        if not mine:
            await self._all_at_it.wait()
        mine.append(spec.name)

    async def stop_all(self, order: Sequence[Sequence[str]], at_once: bool = False) -> None:
        self.order = order


async def test_no_host_waits_for_another_to_start_its_processes_and_each_kind_stops_together(tmp_path: Path) -> None:
    plan = plan_of(on_hosts(tmp_path, "cluster.slots_per_node=2", "engines.student.replicas=2"))
    slow: Any = Slow(plan)
    fleet = Fleet(plan, slow, print, RunKeys.draw())
    async with asyncio.timeout(patience(20)):
        await fleet.start_all()
    assert slow.started == {
        node: [role.name for role in plan.roles if role.node == node] for node in {role.node for role in plan.roles}
    }
    await fleet.stop_all()
    assert sorted(name for kind in slow.order for name in kind) == sorted(role.name for role in plan.roles)
    assert slow.order[-2:] == [["student-engine-0", "student-engine-1"], ["teacher-engine-0"]]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cluster.fence_s=50"], "cluster.lost_s: 45 s, and a host ends its processes only after fence_s 50 s"),
        (["network.bind=127.0.0.2"], "network.bind: 127.0.0.2, but on several hosts each process listens on its own"),
        (["shared_devices=['cuda:0']"], "shared_devices: on several hosts the placement deals the devices out"),
        (
            ["learner.weight_transport=tensor"],
            "learner.weight_transport: tensor needs engines on the learner's own GPU",
        ),
        (["engines.student.devices=['cuda:1']"], "engines.student.devices: cuda:1, but on several hosts the placement"),
        (["cluster.nodes=3"], "cluster.nodes: 3 hosts x 1 CPU slots are 3, and the run needs 4 (2 for the learner and"),
        (["cluster.launcher_takes_devices=false"], "cluster.nodes: 3 hosts x 1 CPU slots are 3, and the run needs 4"),
        (["cluster.backend=local"], "cluster.nodes: 4, but backend: local is one host; write backend: agents"),
        (
            ["cluster.backend=local", "cluster.nodes=1", "learner.devices=[cuda]"],
            "learner.devices: cuda without a number is for several hosts",
        ),
    ],
)
def test_what_no_cluster_can_do_is_refused(tmp_path: Path, overrides: list[str], words: str) -> None:
    problems = list(cluster_problems(on_hosts(tmp_path, *overrides)))
    assert [problem for problem in problems if problem.startswith(words)], problems
    assert all("; " in problem for problem in problems)


def test_a_run_on_hosts_is_valid_and_its_check_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate(on_hosts(tmp_path)) == []
    file = tmp_path / "topology.yaml"
    settings = [word for one in (*AGENTS, "learner.data_parallel=2") for word in ("--set", one)]
    launch(parse_arguments(["--topology", str(file), *settings, "--dry-run"]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("host ")]
    assert [line[:2] for line in lines[1:]] == [["host", str(number)] for number in range(4)]
    assert lines[1][-3:] == ["learner-0", "(rank", "0)"] and "student-engine-0," in lines[3]
