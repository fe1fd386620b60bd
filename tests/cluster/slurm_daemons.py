"""Slurm on the hosts of a lab: the controller on the first, a daemon with four make-believe GPUs on every one.

    env = start(lab, folder)      in this environment sbatch, srun and sinfo find the cluster

The programs are Debian's (`requirements/tools.sh`); what they need of a machine is in a folder of their own.
"""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from lab import Host, Lab, until

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
CONF = """
ClusterName=lab
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/run/slurmd
StateSaveLocation=/run/slurmctld
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdDebug=debug2
SlurmctldDebug=debug2
ReturnToService=2
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def start(lab: Lab, folder: Path) -> dict[str, str]:
    """Start the daemons and wait until every node is idle; returns the environment of Slurm's commands."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        raise AssertionError(f"tests on Slurm need {', '.join(missing)}; run `requirements/tools.sh cluster` as root")
    folder.mkdir()
    first, *_ = lab.hosts
    nodes = "\n".join(f"NodeName={name} CPUs=2 RealMemory=500 Gres=gpu:4 State=UNKNOWN" for name in lab.hosts)
    (folder / "slurm.conf").write_text(CONF.format(first=first, folder=folder, nodes=nodes))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/tty[0-3]\n")  # any device files do
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    env = {"SLURM_CONF": str(folder / "slurm.conf")}
    for host in lab.hosts.values():
        host.run(["mkdir", "-p", "-m", "755", "/run/munge", "/run/slurmd", "/run/slurmctld"])
        places = [f"--{what}-file=/run/munge/munged.{what}" for what in ("pid", "log", "seed")]
        host.run(["munged", "--force", f"--key-file={key}", "--socket=/run/munge/munge.socket.2", *places])
    daemon(lab[first], env, "slurmctld")
    for host in lab.hosts.values():
        daemon(host, env, "slurmd", "-N", host.name)
    until(lambda: states(lab, env) == ["idle"] * len(lab.hosts), lambda: f"idle nodes: {states(lab, env)}", 60)
    return env


def daemon(host: Host, env: dict[str, str], *words: str) -> None:
    """Start one daemon, which goes into the background."""
    host.run(["env", *(f"{name}={value}" for name, value in env.items()), *words])


def states(lab: Lab, env: dict[str, str]) -> list[str]:
    """What the controller says of each node."""
    first = next(iter(lab.hosts.values()))
    words = ["sinfo", "--noheader", "--Node", "--format=%t"]
    return first.run(["env", *(f"{name}={value}" for name, value in env.items()), *words]).split()
