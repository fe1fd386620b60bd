"""What `backend: slurm` reads from its allocation, and the command that starts the agents."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from small_runs import small_topology

from opd_async.checks.cluster import cluster_problems
from opd_async.cluster.allocation import Allocation, find_allocation, require_allocation, with_allocation
from opd_async.cluster.secret import SECRET_ENV, SECRET_FILE_ENV, given_or_drawn
from opd_async.cluster.slurm import srun_command, srun_environment
from opd_async.config.clustering import Backend, ClusterSection
from opd_async.errors import InputError

INSIDE = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "h[0-3]", "SLURMD_NODENAME": "h0"}
SLURM = "cluster.backend=slurm"


def four(nodes: str) -> tuple[str, ...]:
    """What `scontrol show hostnames` says of the nodes above."""
    assert nodes == "h[0-3]"
    return ("h0", "h1", "h2", "h3")


def test_the_launchers_node_has_no_agent_and_a_login_node_is_a_host_more() -> None:
    assert find_allocation({}, four) is None
    batch = find_allocation(INSIDE, four)
    assert batch == Allocation("7", ("h0", "h1", "h2", "h3"), "h0")
    assert batch.hosts == 4 and batch.others(4) == ("h1", "h2", "h3") and batch.others(2) == ("h1",)
    login = find_allocation({**INSIDE, "SLURMD_NODENAME": ""}, four)
    assert login is not None and login.own == "" and login.hosts == 5
    assert login.others(5) == login.nodes and socket.gethostname() not in login.nodes


def test_the_number_of_nodes_is_that_of_the_allocation_where_it_is_left_out(tmp_path: Path) -> None:
    inside = with_allocation(small_topology(tmp_path, SLURM), INSIDE, four).cluster
    assert inside.nodes == 4 and inside.launcher_takes_devices and "nodes" in inside.model_fields_set
    login = with_allocation(small_topology(tmp_path, SLURM), {**INSIDE, "SLURMD_NODENAME": ""}, four).cluster
    assert login.nodes == 5 and not login.launcher_takes_devices
    assert with_allocation(small_topology(tmp_path, SLURM, "cluster.nodes=2"), INSIDE, four).cluster.nodes == 2
    agents = small_topology(tmp_path, "cluster.backend=agents")
    assert with_allocation(agents, INSIDE, four) == agents


@pytest.mark.parametrize(
    ("environment", "nodes", "words"),
    [
        ({}, 2, r"not inside a Slurm allocation \(SLURM_JOB_ID is not set\); start the run by sbatch or salloc"),
        (INSIDE, 5, r"cluster.nodes: 5, and Slurm's job 7 has 4 \(h0, h1, h2, h3\); ask Slurm for more"),
        ({**INSIDE, "SLURMD_NODENAME": ""}, 6, r"has 4 \(h0, h1, h2, h3\) beside this host, which is none of them;"),
        ({**INSIDE, "SLURM_STEP_NUM_TASKS": "4"}, 4, r"srun has started 4 launchers; write `opd run` into the batch"),
    ],
)
def test_a_run_that_cannot_start_from_here_is_refused(environment: dict[str, str], nodes: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        require_allocation(nodes, environment, four)


def test_a_host_without_slurm_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"slurm, and srun and scontrol cannot be found on .*; install Slurm's client"):
        require_allocation(2, INSIDE)


def test_a_check_outside_needs_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    words = "cluster.nodes: left out, and no Slurm allocation is here to say how many there are; write it, or call"
    assert any(problem.startswith(words) for problem in cluster_problems(small_topology(tmp_path, SLURM)))
    assert list(cluster_problems(small_topology(tmp_path, SLURM, "cluster.nodes=2"))) == []


def test_one_srun_has_a_task_on_each_node_and_no_secret_in_its_words() -> None:
    cluster = ClusterSection(backend=Backend.SLURM, nodes=4, python="/opt/python", interface="eth1")
    words = srun_command(cluster, ("h1", "h2"), "10.0.0.1:19999", "opd-agents-1")
    assert words[0] == "srun" and {"--nodelist=h1,h2", "--ntasks=2", "--no-kill", "--kill-on-bad-exit=0"} <= set(words)
    agent = words[words.index("/opt/python") :]
    assert agent[1:5] == ["-m", "opd_async.agent", "--join", "10.0.0.1:19999"] and agent[-2:] == ["--interface", "eth1"]
    batch = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "7", "HOME": "/"}
    assert srun_environment(batch) == {"SLURM_JOB_ID": "7", "HOME": "/"}


def test_a_secret_that_was_given_is_taken_and_another_is_drawn() -> None:
    environment = {SECRET_FILE_ENV: "secret", "HOME": "/"}
    assert given_or_drawn(environment) == {SECRET_FILE_ENV: "secret"} and environment == {"HOME": "/"}
    first, second = given_or_drawn(environment)[SECRET_ENV], given_or_drawn(environment)[SECRET_ENV]
    assert len(first) == 64 and first != second and environment == {"HOME": "/"}
