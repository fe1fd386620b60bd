"""Hosts that join a run and leave it: seats of the plan, who may leave, and how a user asks."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deadlines import patience
from small_runs import small_topology

from opd_async.checks.cluster import cluster_problems
from opd_async.checks.host import network_problems
from opd_async.cluster.nodes import Node
from opd_async.config.topology import Topology
from opd_async.errors import DeadlineError, InputError, RoleError
from opd_async.plan.chunk_bounds import ChunkBounds
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import (
    PLAN_FILE,
    Site,
    make_plan,
    port_keys,
    ports_asked_of_seat,
    ports_of_seat,
    ports_wanted,
    with_seat,
)
from opd_async.run.elastic import Elastic
from opd_async.run.leaving import Request, answer, ask, forget_requests, problem_of, requests, take_requests
from opd_async.signals import EXIT_INTERRUPTED
from opd_async.transport import messages as m

HOSTS = ("cluster.backend=agents", "cluster.nodes=3", "cluster.slots_per_node=2", "cluster.spare_nodes=2")
THREE = ("engines.student.replicas=2", "engines.teacher.replicas=2", "rollout.replicas=2")
ALL = ("h1", "h2")


def elastic(root: Path, *overrides: str) -> Topology:
    """Student and teacher engines on two hosts each, and two seats."""
    return small_topology(root, *HOSTS, *THREE, *overrides)


def plan_of(topology: Topology) -> Plan:
    """Its plan on hosts with made-up ports."""
    ports = tuple(tuple(range(1000 * host, 1000 * host + n)) for host, n in enumerate(ports_wanted(topology), 1))
    names, addresses = ("", "h1", "h2"), ("10.0.0.1", "10.0.0.2", "10.0.0.3")
    return make_plan(topology, None, Site(names=names, addresses=addresses, ports=ports))


def test_the_names_of_a_seat_are_known_before_it_is_taken(tmp_path: Path) -> None:
    plan = plan_of(elastic(tmp_path))
    assert plan.reserved == (
        *("student-engine-2", "student-engine-3", "rollout-2"),
        *("student-engine-4", "student-engine-5", "rollout-3"),
    )
    assert set(plan.reserved) < set(plan.peers) and len(plan.peers) == len(set(plan.peers))
    assert plan.actors == {index: f"rollout-{index}" for index in range(4)}
    assert not set(plan.reserved) & {role.name for role in plan.roles}


def test_a_taken_seat_has_engines_and_an_actor_that_drives_them_alone(tmp_path: Path) -> None:
    topology = elastic(tmp_path)
    plan = plan_of(topology)
    drove = {actor.name: plan.students_of(actor) for actor in plan.of_kind(RoleKind.ROLLOUT)}
    ports = range(7000, 7000 + ports_of_seat(topology))
    grown = with_seat(plan, 0, "h9", "10.0.0.9", ports)
    new = {role.name: role for role in grown.roles if role.node == "h9"}
    assert list(new) == ["student-engine-2", "student-engine-3", "rollout-2"]
    assert {role.host for role in new.values()} == {"10.0.0.9"}
    used = [port for role in new.values() for port in role.ports.values()]
    assert sorted(used) == list(ports)
    urls = grown.students_of(new["rollout-2"])
    assert len(urls) == 2 and all(url.startswith("http://10.0.0.9:7") for url in urls)
    assert grown.student_engines == (*plan.student_engines, *urls)
    for name, engines in drove.items():  # also of an actor that is started again, and then reads this plan
        assert grown.students_of(grown.role(RoleKind.ROLLOUT, int(name[-1]))) == engines
    twice = with_seat(grown, 1, "h8", "10.0.0.8", ports)
    assert [role.name for role in twice.roles if role.node == "h8"] == list(plan.reserved[3:])
    assert twice.peers and set(twice.peers) == set(plan.peers)
    assert Plan.model_validate_json(twice.model_dump_json()) == twice
    first, second = (ChunkBounds(each, None)._actors for each in (plan, twice))
    assert first == second, "those who read the first plan believe the actors of hosts that join"


async def test_hosts_that_join_get_ports_behind_those_of_the_plan(tmp_path: Path) -> None:
    topology = elastic(tmp_path, "network.base_port=30000")
    plan = plan_of(topology)
    plan.run_folder.mkdir(parents=True)
    (plan.run_folder / PLAN_FILE).write_text(plan.model_dump_json())
    asked, taken = list[m.FindPorts](), list[str]()

    async def ask(node: Node, request: Callable[[int], m.FindPorts]) -> m.Answer:
        asked.append(request(1))
        if taken:
            raise RoleError(f"{node.name}: {taken.pop()}")
        return m.Answer(1, None, [])

    dispatcher: Any = SimpleNamespace(plan=plan, fleet=SimpleNamespace(away=set()))
    dispatcher.grow = lambda grown: setattr(dispatcher, "plan", grown)
    hosts: Any = SimpleNamespace(agents=SimpleNamespace(ask=ask), place=lambda name, host: None)
    run = Elastic(dispatcher, hosts, lambda grown: None)
    behind, size = 30000 + len(port_keys(topology)), ports_of_seat(topology)
    for number, name in enumerate(("h8", "h9")):
        expected = list(range(behind + number * size, behind + (number + 1) * size))
        node = Node(name=name, address="10.0.0.9", incarnation="1", route=b"", heard=0.0)
        taken.append("port 30099 is in use")
        with pytest.raises(InputError, match=f"{name}: port 30099 is in use"):
            await run._seat(node)
        roles = await run._seat(node)
        assert [port for role in roles for port in role.ports.values()] == expected
        assert asked[-2:] == [m.FindPorts(1, 0, expected)] * 2
    assert ports_asked_of_seat(elastic(tmp_path / "free"), 0) == []


def test_ports_of_seats_count_too(tmp_path: Path) -> None:
    topology = elastic(tmp_path, "network.base_port=65000", "cluster.spare_nodes=200")
    count = len(port_keys(topology)) + 200 * ports_of_seat(topology)
    words = f"network.base_port: 65000 and {count} ports pass 65535; write a smaller one"
    assert list(network_problems(topology)) == [words]


def test_gpus_of_a_seat_are_dealt_out(tmp_path: Path) -> None:
    sizes = ("cluster.gpus_per_node=5", "engines.student.tensor_parallel=2", "engines.student.devices=[cuda]")
    topology = elastic(tmp_path, *sizes)
    grown = with_seat(plan_of(topology), 0, "h9", "10.0.0.9", range(100, 200))
    devices = [role.devices for role in grown.roles if role.node == "h9" and role.kind is RoleKind.STUDENT_ENGINE]
    assert devices == [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("engines.student.tensor_parallel=2", "cluster.slots_per_node=1"), "a host has no devices for an engine of 2"),
        (("engines.student.router=http://r:1",), "a host that joins brings student engines, and engines.student"),
    ],
)
def test_seats_that_nobody_could_take_are_refused(overrides: tuple[str, ...], words: str, tmp_path: Path) -> None:
    problems = list(cluster_problems(elastic(tmp_path, *overrides)))
    assert any(problem.startswith(f"cluster.spare_nodes: {words}") for problem in problems), problems


def test_who_has_more_than_engines_and_actors_cannot_leave(tmp_path: Path) -> None:
    plan = plan_of(elastic(tmp_path))
    up = {actor.name for actor in plan.of_kind(RoleKind.ROLLOUT)}
    where = {role.name: role.node for role in plan.roles}
    teachers = [name for name, node in where.items() if node == "h1" and "teacher" in name]
    assert teachers and str(problem_of(plan, "h1", up, ALL)).startswith(f"h1 has {teachers[0]}")
    assert problem_of(plan, "h7", up, ALL) == "h7 is no host of this run that could leave; those are h1, h2"
    grown = with_seat(plan, 0, "h9", "10.0.0.9", range(100, 200))
    assert problem_of(grown, "h9", {*up, "rollout-2"}, ("h9",)) is None
    assert problem_of(grown, "h9", {"rollout-2"}, ("h9",)) == (
        "h9 has the only rollout actors that are there; nobody would generate"
    )


def test_whose_engines_are_driven_from_elsewhere_cannot_leave(tmp_path: Path) -> None:
    sizes = ("engines.teacher.replicas=1", "cluster.nodes=3", "cluster.slots_per_node=1", "rollout.replicas=1")
    topology = small_topology(tmp_path, *HOSTS[:1], *sizes, "engines.student.replicas=2")
    topology = topology.model_copy(update={"cluster": topology.cluster.model_copy(update={"nodes": 4})})
    ports = tuple(tuple(range(1000 * host, 1000 * host + n)) for host, n in enumerate(ports_wanted(topology), 1))
    site = Site(names=("", "h1", "h2", "h3"), addresses=tuple(f"10.0.0.{n}" for n in range(1, 5)), ports=ports)
    plan = make_plan(topology, None, site)
    hosts = {role.node for role in plan.of_kind(RoleKind.STUDENT_ENGINE)} - {""}
    problems = [problem_of(plan, host, {"rollout-0"}, hosts) for host in sorted(hosts)]
    assert problems and all("rollout-0 drives engines of" in str(problem) for problem in problems)


# --- asking ----------------------------------------------------------------------------------------------------------


def until_asked(folder: Path) -> list[Request]:
    """What is asked of a run, once anything is."""
    give_up = time.monotonic() + patience(60)
    while not (found := requests(folder)):
        assert time.monotonic() < give_up, "nobody asked"
        time.sleep(0.01)
    return found


def asked(folder: Path, host: str, left: bool, text: str, undo: bool = False) -> str:
    """What `opd drain` gets of a run that answers."""

    def run() -> None:
        found = until_asked(folder)
        assert found == [Request(host, undo)]
        answer(folder, found[0], left, text)

    running = threading.Thread(target=run)
    running.start()
    try:
        return ask(folder, host, patience(60), undo)
    finally:
        running.join()


def begun(folder: Path) -> Path:
    """The folder of a run on several hosts that takes requests."""
    (folder / "plan.json").write_text(plan_of(elastic(folder)).model_dump_json())
    take_requests(folder)
    return folder


def test_a_host_leaves_when_the_run_says_so(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    assert requests(folder) == []
    assert asked(folder, "h1", True, "h1 has left") == "h1 has left" and requests(folder) == []
    with pytest.raises(InputError, match="h1 has learner-0"):
        asked(folder, "h1", False, "h1 has learner-0")
    assert asked(folder, "h1", True, "h1 takes part again", undo=True) == "h1 takes part again"
    with pytest.raises(DeadlineError, match="no weight update has come in 0 s, at which h1 could have left"):
        ask(folder, "h1", 0.0)
    with pytest.raises(DeadlineError, match="at which h1 could have come back"):
        ask(folder, "h1", 0.0, undo=True)
    assert requests(folder) == [], "nobody waits for it any more"
    for name in ("", "../h1", ".h1", "h1.answer", "h1.undo"):
        with pytest.raises(InputError, match="is no name of a host"):
            ask(folder, name, 1.0)


def test_who_asks_where_no_run_goes_on_is_told_so_at_once(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    with pytest.raises(InputError, match="no run; name the folder of one"):
        ask(tmp_path, "h1", patience(60))
    plan.write_text("{}")
    with pytest.raises(InputError, match=r"plan.json: no plan of this version can be read: "):
        ask(tmp_path, "h1", patience(60))
    plan.write_text(make_plan(small_topology(tmp_path)).model_dump_json())
    with pytest.raises(InputError, match=r"a run on one host, which cannot leave it \(cluster.backend: local\)"):
        ask(tmp_path, "h1", patience(60))
    forget_requests(begun(tmp_path))
    with pytest.raises(InputError, match="the run has not started its processes yet, or is over"):
        ask(tmp_path, "h1", patience(60))
    assert requests(tmp_path) == []


@pytest.mark.parametrize("end", [forget_requests, take_requests], ids=["over", "resumed"])
def test_who_waits_is_told_that_the_run_has_ended(tmp_path: Path, end: Callable[[Path], None]) -> None:
    folder = begun(tmp_path)

    def run() -> None:
        until_asked(folder)
        end(folder)

    running = threading.Thread(target=run)
    running.start()
    try:
        with pytest.raises(InputError, match="no answer for h1: the run has ended"):
            ask(folder, "h1", patience(60))
    finally:
        running.join()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_the_request_back(tmp_path: Path, number: signal.Signals) -> None:
    folder = begun(tmp_path)
    words = [sys.executable, "-m", "opd_async.cli", "drain", str(folder), "h1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as asking:
        try:
            until_asked(folder)
            asking.send_signal(number)
            _, errors = asking.communicate(timeout=patience(60))
        finally:
            asking.kill()
    assert asking.returncode == EXIT_INTERRUPTED and errors == "stopped by a signal; the run is asked no more\n"
    assert requests(folder) == []
