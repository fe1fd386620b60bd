"""The nodes of the Slurm allocation that this process is in: what `backend: slurm` takes its hosts from.

    SLURM_JOB_ID, SLURM_JOB_NODELIST, SLURMD_NODENAME -> Allocation -> cluster.nodes

A batch script runs on the first node of its job, so that the launcher's host is one of the nodes. `salloc` may leave
the command on a login node; then every node has an agent, and the launcher's host gives no devices.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opd_async.config.clustering import Backend
from opd_async.config.topology import Topology
from opd_async.errors import InputError

NODE_ENV = "SLURMD_NODENAME"
PROGRAMS = ("srun", "scontrol")
SCONTROL_S = 60.0
_OTHERWISE = "write backend: agents and start the agents yourself (docs/cluster.md)"

Expand = Callable[[str], tuple[str, ...]]
"""Makes the names of a node list, as in `h[0-2]`."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """A job, and its nodes in Slurm's order."""

    job: str
    nodes: tuple[str, ...]
    own: str
    """The node that this process is on; empty where it is on none of them."""

    @property
    def hosts(self) -> int:
        """How many hosts a run can have, with the launcher's."""
        return len(self.nodes) + (not self.own)

    def others(self, hosts: int) -> tuple[str, ...]:
        """The nodes that get an agent in a run on so many hosts."""
        return tuple(node for node in self.nodes if node != self.own)[: hosts - 1]

    def too_few_for(self, hosts: int) -> str | None:
        """Say that a run on so many hosts has no room here; None if it has."""
        if hosts <= self.hosts:
            return None
        without = "" if self.own else " beside this host, which is none of them"
        return (
            f"cluster.nodes: {hosts}, and Slurm's job {self.job} has {len(self.nodes)} ({', '.join(self.nodes)})"
            f"{without}; ask Slurm for more with --nodes, or leave cluster.nodes out"
        )


def hostnames(nodes: str) -> tuple[str, ...]:
    """The names of a node list, by Slurm's own tool. Raises `InputError` where it is missing or does not know them."""
    _require_slurm()
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=SCONTROL_S, check=False
    )
    if done.returncode or not done.stdout.split():
        raise InputError(
            f"cluster.backend: slurm, and `scontrol show hostnames {nodes}` fails ({done.stderr.strip()}); see that "
            "slurm.conf is found on this host"
        )
    return tuple(done.stdout.split())


def _require_slurm() -> None:
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        raise InputError(
            f"cluster.backend: slurm, and {' and '.join(missing)} cannot be found on {socket.gethostname()}; install "
            f"Slurm's client or correct PATH, or {_OTHERWISE}"
        )


def find_allocation(environment: Mapping[str, str] = os.environ, expand: Expand = hostnames) -> Allocation | None:
    """Find the allocation of this process; None outside of one."""
    job, nodes = environment.get("SLURM_JOB_ID"), environment.get("SLURM_JOB_NODELIST")
    if not job or not nodes:
        return None
    names = expand(nodes)
    mine = (environment.get(NODE_ENV, ""), socket.gethostname(), socket.gethostname().partition(".")[0])
    return Allocation(job, names, next((name for name in mine if name in names), ""))


def require_allocation(
    hosts: int, environment: Mapping[str, str] = os.environ, expand: Expand = hostnames
) -> Allocation:
    """The allocation, which has room for so many hosts. Raises `InputError` where a run cannot start from here."""
    if expand is hostnames:
        _require_slurm()
    allocation = find_allocation(environment, expand)
    if allocation is None:
        raise InputError(
            "cluster.backend: slurm, and this is not inside a Slurm allocation (SLURM_JOB_ID is not set); start the "
            f"run by sbatch or salloc, or {_OTHERWISE}"
        )
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise InputError(
            f"cluster.backend: slurm, and srun has started {environment['SLURM_STEP_NUM_TASKS']} launchers; write "
            "`opd run` into the batch script without srun"
        )
    if problem := allocation.too_few_for(hosts):
        raise InputError(problem)
    return allocation


def with_allocation(
    topology: Topology, environment: Mapping[str, str] = os.environ, expand: Expand = hostnames
) -> Topology:
    """The topology with the number of nodes that the allocation has, where `cluster.nodes` is left out."""
    cluster = topology.cluster
    if cluster.backend is not Backend.SLURM:
        return topology
    allocation = find_allocation(environment, expand)
    if allocation is None:
        return topology
    found: dict[str, object] = {}
    if "nodes" not in cluster.model_fields_set:
        found["nodes"] = allocation.hosts
    if not allocation.own and "launcher_takes_devices" not in cluster.model_fields_set:
        found["launcher_takes_devices"] = False
    return topology.model_copy(update={"cluster": cluster.model_copy(update=found)})
