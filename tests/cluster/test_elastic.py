"""A run on hosts of a lab that one more joins, and that others leave in order, also the one that it began with."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from cluster_run import PORT, ClusterRun, settings
from deadlines import patience
from harness import check_trained, loud_lines, steps
from lab import Host, Lab

from opd_async.plan.plan import Plan, RoleKind
from opd_async.run.trained import read_trained

FOUR = ("h0", "h1", "h2", "h3")
STUDENT, NEW = "h1", "h3"
FIRST_PORT, OF_THE_KERNEL = 21000, range(50000, 53000)


def listening(host: Host) -> set[int]:
    """The ports of a host at which other hosts may reach something."""
    rows = [line.split() for line in host.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"]).splitlines()]
    ends = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {int(port, 16) for address, port in ends if address != "0100007F"}


def check_ports(lab: Lab, folder: Path) -> None:
    """Those of the plan are counted from the first one, also those of the host that has joined; others are the kernel's
    or the agents'."""
    plan = Plan.model_validate_json((folder / "plan.json").read_bytes())
    planned = {plan.launcher_metrics_port, int(plan.control.rpartition(":")[2])}
    planned |= {port for role in plan.roles for port in role.ports.values()}
    assert planned == set(range(FIRST_PORT, FIRST_PORT + len(planned)))
    found = {name: listening(host) for name, host in lab.hosts.items()}
    assert not set().union(*found.values()) - planned - {PORT} - set(OF_THE_KERNEL), found
    assert plan.role(RoleKind.LEARNER, 0).ports["weights"] in found["h0"], found


def test_a_host_joins_and_hosts_are_drained_and_come_back(inputs: Path, tmp_path: Path) -> None:
    """One joins; the only host with students at the start leaves and comes back; the one that joined leaves.

    The topology says which ports the run takes, and the kernel of each host gives out few of its own.
    """
    values = settings(inputs, tmp_path, 3, schedule__steps=4000, network__base_port=FIRST_PORT)
    values["cluster"]["spare_nodes"] = 1
    folder = tmp_path / "run"
    with Lab(FOUR) as lab:
        for host in lab.hosts.values():
            few = f"{OF_THE_KERNEL.start} {OF_THE_KERNEL.stop - 1}"
            host.run(["sh", "-c", f"echo {few} > /proc/sys/net/ipv4/ip_local_port_range"])
        run = ClusterRun(lab, tmp_path, values, others=FOUR[1:3])

        def more(count: int) -> None:
            run.wait_for_steps(folder, len(steps(folder)) + count)

        def drain(host: str, *options: str, code: int = 0) -> str:
            words = [sys.executable, "-m", "opd_async.cli", "drain", *options, str(folder), host]
            done = subprocess.run(
                lab["h0"].command(words), capture_output=True, text=True, check=False, timeout=patience(120)
            )
            assert done.returncode == code, f"{done.stdout}{done.stderr}\n{run.said()}"
            return done.stdout + done.stderr

        run.wait_for_steps(folder, 2)
        assert "nobody would generate" in drain(STUDENT, code=2)
        assert "h2 has teacher-engine-0, teacher-0; only one" in drain("h2", code=2)

        run.agents[NEW] = run.agent(lab[NEW])
        run.wait_for_text(f"{NEW} takes part with student-engine-1, rollout-1", 120)
        more(3)
        check_ports(lab, folder)
        assert f"{STUDENT} has left the run" in drain(STUDENT)
        assert run.agents[STUDENT].wait(patience(60)) == 0 and lab[STUDENT].processes() == []
        more(4)  # all of it by the host that has joined

        run.agents[STUDENT] = run.agent(lab[STUDENT])  # as Kubernetes does at once
        run.wait_for_text("this host was drained, and takes part again after `opd drain --undo`; joining again")
        assert f"{NEW} was not drained in this launch" in drain(NEW, "--undo", code=2)
        assert f"{STUDENT} takes part again as soon as an agent is there" in drain(STUDENT, "--undo")
        run.wait_for_text(f"{STUDENT} takes part with student-engine-0, rollout-0", 120)
        more(2)
        assert f"{NEW} has left the run" in drain(NEW)
        assert run.agents[NEW].wait(patience(60)) == 0 and lab[NEW].processes() == []
        more(3)
        lab["h0"].signal("opd_async.launch", signal.SIGINT)
        assert run.end() == 130, run.said()
        assert run.left() == [], run.left()
        assert "or is over; no host can leave it" in drain(STUDENT, code=2)
    check_trained(folder, 1, len(list(read_trained(folder))))
    assert "is lost" not in run.said() and "restarting" not in run.said(), run.said()
    assert [line for line in loud_lines(folder) if "ERROR" in line] == []
