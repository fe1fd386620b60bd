"""Whole runs on hosts of a lab: to their end, and through the loss of hosts, agents and the launcher."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_run import FENCE_S, LOST_S, SECRET, ClusterRun, settings
from deadlines import patience
from harness import ROOT, check_trained, loud_lines, steps
from lab import Lab, until

from opd_async.plan.plan import Plan

THREE = ("h0", "h1", "h2")
LEARNER, STUDENT, TEACHER = THREE
"""Who is where with one slot a host."""
LASTING_S = 30.0
"""The fence as it is by default, of a test in which nobody should be fenced."""


@pytest.fixture
def lab() -> Iterator[Lab]:
    """Three hosts of their own for each test."""
    with Lab(THREE) as three:
        yield three


def test_the_quickstart_runs_on_three_hosts_to_its_export(lab: Lab, tmp_path: Path) -> None:
    """The shipped example with the cluster's keys added: placement, evaluation, checkpoints, export, nothing left."""
    make_data = [sys.executable, "examples/addition/make_data.py", "--out", str(tmp_path), "--train", "2000"]
    subprocess.run([*make_data, "--held-out", "100"], cwd=ROOT, check=True, timeout=patience(60))
    changes = [f"data.{key}.path={tmp_path / key}.jsonl" for key in ("train", "held_out")]
    changes += [
        "schedule.steps=6",
        "evaluation.prompts=16",
        "evaluation.during_prompts=16",
        "evaluation.every_steps=null",
    ]
    changes += [f"run_dir={tmp_path / 'runs'}", "name=run", "cluster.nodes=3", "cluster.slots_per_node=1"]
    options = [word for change in changes for word in ("--set", change)]
    run = ClusterRun(lab, tmp_path, ROOT / "examples/cluster/two-hosts.yaml", *options)
    run.wait_for_text("weights 0 are in every student engine, proven by version and content", 120)
    there = {host.name: [" ".join(one.info["cmdline"]) for one in host.processes()] for host in lab.hosts.values()}
    for host, word in ((LEARNER, "learner.main"), (LEARNER, "actors.intake"), (STUDENT, "actors.rollout")):
        assert any(word in line for line in there[host]) and sum(word in " ".join(there[name]) for name in there) == 1
    for host in (STUDENT, TEACHER):
        assert any("engine.server" in line and f"--host {lab[host].address}" in line for line in there[host])
    assert not any(SECRET in line for lines in there.values() for line in lines)
    assert run.end() == 0, run.said()
    folder = tmp_path / "runs/run"
    check_trained(folder, 1, 6)
    assert (folder / "export/model.safetensors").is_file() and loud_lines(folder) == []
    assert run.left() == [] and [agent.poll() for agent in run.agents.values()] == [0, 0]
    assert SECRET not in run.said() and not list((tmp_path / "runs").glob(".shared*"))
    roles = json.loads((folder / "plan.json").read_text())["roles"]
    assert {role["host"] for role in roles} == {host.address for host in lab.hosts.values()}


def test_a_host_is_cut_off_shortly_then_for_good_and_comes_back(lab: Lab, inputs: Path, tmp_path: Path) -> None:
    """Some seconds change nothing. For good: all of it is gone before it is given up, and starts again on return."""
    run = ClusterRun(lab, tmp_path, settings(inputs, tmp_path, 3, schedule__steps=30))
    folder, student = tmp_path / "run", lab[STUDENT]
    run.wait_for_steps(folder, 2)
    student.cut()
    time.sleep(FENCE_S / 3)  # TCP sends again after .2, .4, .8 ... s: what is cut for t is heard again within 2 t
    student.heal()
    run.wait_for_steps(folder, 6)
    assert "is lost" not in run.said() and "was not heard" not in run.said(), run.said()

    student.cut()
    run.wait_for_text(f"{STUDENT} is lost", LOST_S)
    assert student.processes("opd_async.actors") == [], "the fence is shorter than the launcher's patience"
    student.heal()
    run.wait_for_text(f"{STUDENT} is back", 60)
    assert run.end() == 0, run.said()
    ranges = check_trained(folder, 1, 30)
    assert len(ranges) > 10 and run.left() == []
    report = json.loads((folder / "report.json").read_text())
    assert report["restarts"].keys() >= {"student-engine-0", "rollout-0"} and "learner-0" not in report["restarts"]


def test_ten_seconds_without_a_network_change_nothing(lab: Lab, inputs: Path, tmp_path: Path) -> None:
    """Of a host of engines and actors, then of the host of launcher and learner: no process ends, no token is lost."""
    values = settings(inputs, tmp_path, 3, schedule__steps=100_000)
    values["cluster"] |= {"fence_s": patience(LASTING_S), "lost_s": patience(LASTING_S) + 15}
    run = ClusterRun(lab, tmp_path, values)
    folder = tmp_path / "run"
    run.wait_for_steps(folder, 2)
    for host in (lab[STUDENT], lab[LEARNER]):
        before = {process.pid for each in lab.hosts.values() for process in each.processes()}
        host.cut()
        time.sleep(10)
        host.heal()
        run.wait_for_steps(folder, len(steps(folder)) + 3)
        assert before <= {process.pid for each in lab.hosts.values() for process in each.processes()}, run.said()
    lab[LEARNER].signal("opd_async.launch", signal.SIGINT)
    assert run.end() == 130, run.said()
    assert "is lost" not in run.said() and "was not heard" not in run.said(), run.said()
    check_trained(folder, 1, len(steps(folder)))
    assert json.loads((folder / "report.json").read_text())["restarts"] == {} and run.left() == []


def test_a_run_goes_on_without_a_host_whose_power_is_cut_and_waits_for_another(inputs: Path, tmp_path: Path) -> None:
    """One of two with students: the other one generates. The teacher's: the run stands until it is switched on again.

    No packet says that anything has ended, and what comes back knows nothing.
    """
    values = settings(inputs, tmp_path, 4, schedule__steps=100_000, rollout__replicas=2)
    values["engines"]["student"]["replicas"] = 2
    folder = tmp_path / "run"
    with Lab(("h0", "h1", "h2", "h3")) as lab:
        run = ClusterRun(lab, tmp_path, values)

        def more(count: int) -> None:
            run.wait_for_steps(folder, len(steps(folder)) + count)

        def lose_power(name: str) -> None:
            lab[name].power_off()
            run.wait_for_text(f"{name} is lost", LOST_S)

        def have_it_back(name: str, role: str) -> None:
            lab[name].power_on()
            assert lab[name].processes() == []
            run.agents[name] = run.agent(lab[name])
            run.wait_for_text(f"{name} is back", 60)
            until(lambda: lab[name].processes(role), lambda: f"{role} on {name}:\n{run.said()}", 90)
            more(3)

        run.wait_for_steps(folder, 2)
        plan = Plan.model_validate_json((folder / "plan.json").read_bytes())
        where = {role.name: role.node for role in plan.roles}
        student, teacher = where["rollout-1"], where["teacher-0"]
        lose_power(student)
        more(4)  # behind the step that was under way: by the other host with students
        have_it_back(student, "actors.rollout")
        lose_power(teacher)
        have_it_back(teacher, "actors.teacher")
        lab[LEARNER].signal("opd_async.launch", signal.SIGINT)
        assert run.end() == 130, run.said()
        assert run.left() == [], run.left()
    check_trained(folder, 1, len(steps(folder)))
    again = json.loads((folder / "report.json").read_text())["restarts"]
    assert again.keys() == {name for name, host in where.items() if host in (student, teacher)}, again


def test_agents_are_killed_then_the_launcher(inputs: Path, tmp_path: Path) -> None:
    """The kernel ends what an agent has started; the lease ends what a launcher has. The run can be resumed.

    The first agent has one of two student engines, which refuses the weights at once, long before its host is known to
    be lost: the update goes on without it then. Agents that are started again are so in another folder.
    """

    def values(last: int) -> dict[str, Any]:
        topology = settings(inputs, tmp_path, 4, schedule__steps=last)
        topology["engines"]["student"]["replicas"] = 2
        return topology

    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with Lab(("h0", "h1", "h2", "h3")) as lab:
        run = ClusterRun(lab, tmp_path, values(100_000))
        run.wait_for_steps(folder, 2)
        plan = Plan.model_validate_json((folder / "plan.json").read_bytes())
        where = {role.name: role.node for role in plan.roles}
        assert where["rollout-0"] != where["student-engine-1"]

        def kill_agent(name: str) -> None:
            (agent,) = lab[name].processes("opd_async.agent")
            agent.kill()
            until(lambda: lab[name].processes() == [], lambda: f"the end of {lab[name].processes()}")

        def start_agent(name: str) -> None:
            run.agents[name] = run.agent(lab[name], folder=elsewhere)
            run.wait_for_text(f"{name} is back", LOST_S + 30)
            run.wait_for_steps(folder, len(steps(folder)) + 2)

        student, teacher = where["student-engine-1"], where["teacher-0"]
        kill_agent(student)
        run.wait_for_text(f"{student} is lost", LOST_S)
        run.wait_for_steps(folder, len(steps(folder)) + 12)  # more than its responses would leave slots for
        start_agent(student)
        kill_agent(teacher)
        start_agent(teacher)

        def folders() -> set[str]:
            return {role.cwd() for role in lab[teacher].processes("opd_async.actors")}

        until(lambda: folders() == {str(Path.cwd())}, lambda: f"them in the launcher's folder: {folders()}")

        lab[LEARNER].signal("opd_async.launch", signal.SIGKILL)
        until(lambda: run.left() == [], lambda: f"the end of everything: {run.left()}\n{run.said()}", FENCE_S + 60)
        codes = [agent.wait(patience(30)) for agent in run.agents.values()]
        assert codes == [1, 1, 1], "no launcher came back for them"
        sealed = (folder / "checkpoints").glob("step_*/complete.json")
        kept = max(int(path.parent.name.split("_")[1]) for path in sealed)

        again = ClusterRun(lab, tmp_path, values(kept + 4), "--resume")
        assert again.end() == 0, again.said()
        assert again.left() == []
    check_trained(folder, 1, kept + 4)


def test_a_learner_of_two_ranks_on_two_hosts_loses_one_of_them(inputs: Path, tmp_path: Path) -> None:
    """One event, whichever process dies: both ranks and the intake go back to the checkpoint once the host is back."""
    values = settings(inputs, tmp_path, 4, schedule__steps=100_000, learner__data_parallel=2)
    with Lab(("h0", "h1", "h2", "h3")) as lab:
        run = ClusterRun(lab, tmp_path, values)
        folder = tmp_path / "run"
        run.wait_for_steps(folder, 4)
        ranks = [bool(host.processes("learner.main", "--plan")) for host in lab.hosts.values()]
        assert ranks == [True, True, False, False]
        lab["h1"].unplug()
        run.wait_for_text("h1 is lost", LOST_S)
        assert lab["h1"].processes("opd_async.learner") == []
        lab["h1"].plug()
        run.wait_for_text("learner and intake start again from step", 90)
        run.wait_for_steps(folder, len(steps(folder)) + 4)
        lab["h0"].signal("opd_async.launch", signal.SIGINT)
        assert run.end() == 130, run.said()
        assert run.left() == [] and (folder / "logs/learner-1.log").is_file()
    check_trained(folder, 1, len(steps(folder)))
    report = json.loads((folder / "report.json").read_text())
    assert sum(report["restarts"].values()) == 1, "one restart, not one for each process"


def test_a_learner_goes_on_with_one_rank_until_its_other_host_can_be_taken_back(inputs: Path, tmp_path: Path) -> None:
    """It exports with one rank, and no host is asked to wait for it; with both again where it goes back anyhow."""
    values = settings(inputs, tmp_path, 4, schedule__steps=100_000, learner__data_parallel=2)
    values["cluster"]["node_back_s"] = 5
    values["checkpoint"] |= {"export_hf": True, "export_hf_every_steps": 2}
    folder = tmp_path / "run"
    with Lab(("h0", "h1", "h2", "h3")) as lab:
        run = ClusterRun(lab, tmp_path, values)
        run.wait_for_steps(folder, 4)
        lab["h1"].unplug()
        run.wait_for_text("h1 is lost", LOST_S)
        smaller = "going on without h1, not back in 5 s (cluster.node_back_s): the learner has 1 of 2 ranks, on the "
        run.wait_for_text(f"{smaller}launcher's host", 90)
        run.wait_for_text("learner and intake start again from step", 60)
        run.wait_for_steps(folder, len(steps(folder)) + 4)
        exported = (folder / "export").glob("step_*/model.safetensors")
        assert max(int(file.parent.name.removeprefix("step_")) for file in exported) > 4
        plan = Plan.model_validate_json((folder / "plan.json").read_bytes())
        assert plan.topology.learner.data_parallel == 1 and plan.role_of_rank(0).node == ""
        assert "data_parallel: 2" in (folder / "topology.yaml").read_text()

        assert run.agents["h1"].wait(patience(90)) == 1, "it has found no launcher in its 30 s"
        lab["h1"].plug()
        run.agents["h1"] = run.agent(lab["h1"])
        run.wait_for_text("h1 is idle: the learner takes it when it next goes back to a checkpoint", 90)
        assert lab["h1"].processes("opd_async.learner") == []
        lab["h0"].signal("learner.main", signal.SIGKILL)
        run.wait_for_text("h1 is there again: the learner has 2 of 2 ranks, on the launcher's host, h1", 90)
        until(lambda: run.said().count("learner and intake start again from step") == 2, run.said, 90)
        run.wait_for_steps(folder, len(steps(folder)) + 2)
        assert lab["h1"].processes("opd_async.learner.main") != []
        lab["h0"].signal("opd_async.launch", signal.SIGINT)
        assert run.end() == 130, run.said()
        assert run.left() == [], run.left()
    check_trained(folder, 1, len(steps(folder)))
    report = json.loads((folder / "report.json").read_text())
    assert sum(report["restarts"].values()) == 2, report["restarts"]


def test_what_is_wrong_with_a_host_is_said_before_anything_starts(lab: Lab, inputs: Path, tmp_path: Path) -> None:
    """A folder that is not shared, an interface that is not there: a message each, exit code 2."""
    shared = tmp_path / "shared"
    shared.mkdir()
    values = settings(inputs, shared, 3)
    lab[TEACHER].hide(shared)
    run = ClusterRun(lab, tmp_path, values)
    assert run.end(60) == 2
    assert f"{TEACHER}: {shared} (run_dir): what the launcher writes there is not seen here" in run.output.read_text()
    assert run.left() == [] and not (shared / "run").exists()

    values["cluster"]["interface"] = "eth7"
    run = ClusterRun(lab, tmp_path, values)
    assert run.process.wait(patience(60)) == 2
    assert (
        "h0 has no interface eth7 with an IPv4 address, but lo (127.0.0.1), eth0 (10.88.0.10)" in run.output.read_text()
    )
    for agent in run.agents.values():
        agent.terminate()
