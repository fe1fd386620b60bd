"""Ray on the hosts of a lab: the head with its dashboard on the first, a raylet with four make-believe GPUs on each.

    env = start(lab)      in this environment `ray job submit` and a launcher find the cluster

Ray is that of `make ray`, in an environment of its own.
"""

from __future__ import annotations

import os
import subprocess

from deadlines import patience
from harness import ROOT
from lab import Host, Lab

FOLDER = ROOT / ".venv-ray"
RAY, PYTHON = FOLDER / "bin/ray", FOLDER / "bin/python"
PORT, JOBS = 6379, 8265
GPUS = 4
STORE_BYTES = 100_000_000
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}


def start(lab: Lab) -> dict[str, str]:
    """Start Ray on every host, the first is the head; returns the environment of what uses it there."""
    if not RAY.exists():
        raise AssertionError(f"tests on Ray need {RAY}; run `make ray`")
    head, *others = lab.hosts.values()
    # a machine may be busy: Ray's own deadlines end a node whose parts have not started in half a minute
    slow = {"RAY_raylet_start_wait_time_s": f"{patience(20):.0f}"}
    slow["RAY_agent_register_timeout_ms"] = f"{1000 * patience(20):.0f}"
    env = {**QUIET, **slow, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # in /run, of which each host has one of its own; the others are told by the head
    jobs = (f"--dashboard-host={head.address}", f"--dashboard-port={JOBS}")
    own = ("--head", f"--port={PORT}", *jobs, "--temp-dir=/run/ray")
    _start(head, env, *own)
    for host in others:
        _start(host, env, f"--address={head.address}:{PORT}")
    return {**env, "RAY_ADDRESS": f"{head.address}:{PORT}"}


def _start(host: Host, env: dict[str, str], *words: str) -> None:
    # what hides the machine's own GPUs from tests would hide these too
    outside = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    here = (f"--node-ip-address={host.address}", "--num-cpus=2", f"--num-gpus={GPUS}")
    done = subprocess.run(
        host.command([str(RAY), "start", *words, *here, f"--object-store-memory={STORE_BYTES}"]),
        env={**outside, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=patience(120),
    )
    assert done.returncode == 0, f"Ray on {host.name}: {done.stdout}"


def is_daemon(line: str) -> bool:
    """Whether a command line is of Ray's own, and not of what a run has started by it."""
    if "ray_driver.py" in line or line.startswith("ray::Leash"):
        return False
    return str(FOLDER) in line or line.startswith(("ray::", "ray-dashboard"))
