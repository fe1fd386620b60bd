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

FOLDER = (ROOT / ".venv-ray").resolve()  # as the daemons' command lines have it
RAY, PYTHON = FOLDER / "bin/ray", FOLDER / "bin/python"
PORT, JOBS = 6379, 8265
GPUS = 4
STORE_BYTES = 100_000_000
TRIES = 6
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}


def start(lab: Lab) -> dict[str, str]:
    """Start Ray on every host, the first is the head; returns the environment of what uses it there."""
    if not RAY.exists():
        raise AssertionError(f"tests on Ray need {RAY}; run `make ray`")
    head, *others = lab.hosts.values()
    env = {**QUIET, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # in /run, of which each host has one of its own; the others are told by the head
    jobs = (f"--dashboard-host={head.address}", f"--dashboard-port={JOBS}")
    own = ("--head", f"--port={PORT}", *jobs, "--temp-dir=/run/ray")
    _start(head, env, *own)
    for host in others:
        _start(host, env, f"--address={head.address}:{PORT}")
    return {**env, "RAY_ADDRESS": f"{head.address}:{PORT}"}


def _start(host: Host, env: dict[str, str], *words: str) -> None:
    """Start one node; again where its parts have not come up in the fixed quarter of a minute that a raylet gives them,
    which a busy machine takes longer for."""
    here = (f"--node-ip-address={host.address}", "--num-cpus=2", f"--num-gpus={GPUS}")
    for _ in range(TRIES):
        done = _ray(host, env, "start", *words, *here, f"--object-store-memory={STORE_BYTES}")
        if done.returncode == 0:
            return
        _ray(host, env, "stop", "--force")
    raise AssertionError(f"Ray on {host.name} did not start in {TRIES} tries: {done.stdout}")


def _ray(host: Host, env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    # what hides the machine's own GPUs from tests would hide those that are make-believe
    outside = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.run(
        host.command([str(RAY), *words]),
        env={**outside, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=patience(120),
    )


def is_daemon(line: str) -> bool:
    """Whether a command line is of Ray's own, and not of what a run has started by it."""
    if "ray_driver.py" in line or line.startswith("ray::Leash"):
        return False
    return str(FOLDER) in line or line.startswith(("ray::", "ray-dashboard"))
