"""Runs on real Slurm daemons, one on each host of a lab: allocation, agents by srun, what dies, what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_daemons
import yaml
from cluster_run import LOST_S, settings
from deadlines import patience
from harness import ROOT, check_trained, steps
from lab import Lab, until

THREE = ("h0", "h1", "h2")
EXAMPLES = ROOT / "examples/cluster"
SECRET_ENV = "OPD_CLUSTER_SECRET="

ENDED = (
    "COMPLETED",
    "FAILED",
    "TIMEOUT",
    "CANCELLED",
    "DEADLINE",
    "NODE_FAIL",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
)
"""States in which a job stays."""


class SlurmLab:
    """Three hosts with Slurm; everything is asked for on the first."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.daemons = folder / "slurm"
        self.env = slurm_daemons.start(lab, self.daemons)
        self.env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "OPD": str(Path(sys.executable).with_name("opd"))}
        self.output = folder / "job.out"

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the first host to its end."""
        return subprocess.run(
            self.lab["h0"].command(words),
            env={**os.environ, **self.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=patience(60),
        )

    def submit(self, *words: str) -> str:
        """Hand a batch script in; returns the job's number."""
        done = self.ask("sbatch", "--parsable", f"--output={self.output}", f"--chdir={ROOT}", *words)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def said(self) -> str:
        """What the job has printed."""
        return self.output.read_text() if self.output.exists() else ""

    def state(self, job: str) -> str:
        """The job's state, as in COMPLETED."""
        return self.ask("scontrol", "--oneliner", "show", "job", job).stdout.partition("JobState=")[2].split()[0]

    def ended(self, job: str) -> bool:
        """Whether it is over; a job that is being told of its limit is SIGNALING for a moment."""
        return self.state(job) in ENDED

    def wait_for(self, words: str, deadline_s: float = 60) -> None:
        """Return once the job has printed `words`."""
        until(lambda: words in self.said(), lambda: f"{words!r} in\n{self.said()}", deadline_s)

    def left(self) -> list[str]:
        """Command lines of what is on any host and is no daemon of Slurm's."""
        daemons = ("munged ", "slurmctld", "slurmd ", ": slurmscriptd")
        hosts = self.lab.hosts.values()
        lines = [(host.name, " ".join(process.info["cmdline"])) for host in hosts for process in host.processes()]
        return [f"{name}: {line}" for name, line in lines if line and not line.startswith(daemons)]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[SlurmLab]:
    """A cluster of its own for each test."""
    with Lab(THREE) as lab:
        yield SlurmLab(lab, tmp_path)


def test_a_run_in_an_allocation_survives_what_it_can_and_leaves_nothing(
    slurm: SlurmLab, inputs: Path, tmp_path: Path
) -> None:
    """The shipped script, nodes and GPUs from the allocation; an agent, then a slurmd are killed; on to the end."""
    values = settings(inputs, tmp_path, 3, schedule__steps=20)
    del values["cluster"]["nodes"], values["cluster"]["backend"]
    values["cluster"]["gpus_per_node"] = 2  # an agent that does not see both is refused
    file, folder = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(values))
    script = EXAMPLES / "slurm.sbatch"
    job = slurm.submit("--nodes=3", "--gres=gpu:2", str(script), str(file))

    def moved(count: int) -> None:
        until(
            lambda: len(steps(folder)) >= count or slurm.ended(job),
            lambda: f"{count} steps of {len(steps(folder))}:\n{slurm.said()}",
            180,
        )
        assert len(steps(folder)) >= count, slurm.said()

    slurm.wait_for("starting agents on h1, h2 by srun", 60)
    moved(2)
    agents = {name: host.processes("opd_async.agent", "--join") for name, host in slurm.lab.hosts.items()}
    assert [sum("srun" not in each.info["cmdline"][0] for each in agents[name]) for name in THREE] == [0, 1, 1]
    environment = agents["h2"][0].environ()
    secret = environment[SECRET_ENV.rstrip("=")]
    everything = [process for host in slurm.lab.hosts.values() for process in host.processes()]
    assert len(secret) == 64 and not any(secret in " ".join(process.info["cmdline"]) for process in everything)

    agents["h2"][0].kill()
    slurm.wait_for("h2 is lost", LOST_S + 30)
    slurm.wait_for("h2 is back", 60)
    moved(len(steps(folder)) + 2)
    (slurmd,) = slurm.lab["h1"].processes("slurmd", "-N")
    slurmd.kill()  # its steps go on without it
    until(lambda: slurm.ended(job), lambda: f"the end of\n{slurm.said()}", 240)
    assert slurm.state(job) == "COMPLETED", slurm.said()
    check_trained(folder, 1, 20)
    report = json.loads((folder / "report.json").read_text())
    assert "teacher-0" in report["restarts"] and "rollout-0" not in report["restarts"]
    until(lambda: slurm.left() == [], lambda: f"the end of {slurm.left()}", 30)
    texts = [*slurm.daemons.glob("*.log"), *(folder / "logs").glob("*.log"), slurm.output, folder / "plan.json"]
    assert len(texts) > 8 and not any(secret in text.read_text() for text in texts)


@pytest.mark.parametrize("script", ["slurm.sbatch", "agents.sbatch"])
def test_a_time_limit_that_comes_near_ends_a_run_in_order_and_another_job_goes_on(
    slurm: SlurmLab, inputs: Path, tmp_path: Path, script: str
) -> None:
    """Five minutes before the limit, as both scripts say: a checkpoint, code 130, nothing left; then `--resume`."""
    values = settings(inputs, tmp_path, 3, schedule__steps=100_000)
    if script == "slurm.sbatch":
        del values["cluster"]["nodes"], values["cluster"]["backend"]
    file, folder = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(values))
    job = slurm.submit("--nodes=3", "--time=20", str(EXAMPLES / script), str(file))
    until(lambda: len(steps(folder)) >= 3, lambda: f"three steps of\n{slurm.said()}", 180)
    assert slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=5").returncode == 0  # Slurm looks twice a minute
    until(lambda: slurm.ended(job), lambda: f"the end of\n{slurm.said()}", 120)
    assert slurm.state(job) == "FAILED", f"{slurm.state(job)}, and not by its limit\n{slurm.said()}"
    assert "ExitCode=130:0" in slurm.ask("scontrol", "--oneliner", "show", "job", job).stdout, slurm.said()
    done = len(steps(folder))
    assert f"stopped by a signal, saved after step {done} of 100000; go on with --resume" in slurm.said()
    until(lambda: slurm.left() == [], lambda: f"the end of {slurm.left()}", 30)

    slurm.output = tmp_path / "resumed.out"
    job = slurm.submit(
        "--nodes=3", str(EXAMPLES / script), str(file), "--resume", "--set", f"schedule.steps={done + 2}"
    )
    until(lambda: slurm.ended(job), lambda: slurm.said(), 180)
    assert slurm.state(job) == "COMPLETED", slurm.said()
    check_trained(folder, 1, done + 2)


def test_what_cannot_start_is_said_at_once(slurm: SlurmLab, inputs: Path, tmp_path: Path) -> None:
    """Outside of an allocation, more nodes than it has, a Python that is not there, a launcher that is killed."""
    values = settings(inputs, tmp_path, 3)
    values["cluster"] |= {"backend": "slurm"}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    for script in EXAMPLES.glob("*.sbatch"):
        done = slurm.ask("sbatch", "--test-only", "--nodes=3", str(script), str(file))
        assert done.returncode == 0, f"{script.name}: {done.stdout}"

    launch = (sys.executable, "-m", "opd_async.launch", "--topology", str(file))
    done = slurm.ask(*launch)
    assert done.returncode == 2 and "not inside a Slurm allocation (SLURM_JOB_ID is not set)" in done.stdout
    inside = ("salloc", "--nodes=2", *launch)
    done = slurm.ask(*inside, "--set", "cluster.nodes=4")
    assert done.returncode == 2 and "cluster.nodes: 4, and Slurm's job" in done.stdout, done.stdout
    done = slurm.ask("salloc", "--nodes=3", *launch, "--set", "cluster.python=/no/python")
    assert done.returncode == 2 and "srun could not keep an agent on every node; it says: " in done.stdout, done.stdout
    assert "/no/python" in done.stdout and not (tmp_path / "run").exists()
    until(lambda: slurm.left() == [], lambda: f"the end of {slurm.left()}", 30)

    job = slurm.submit("--nodes=3", str(EXAMPLES / "slurm.sbatch"), str(file))
    until(lambda: len(steps(tmp_path / "run")) >= 1, lambda: f"a step of\n{slurm.said()}", 180)
    slurm.lab["h0"].signal("opd run", 9)
    until(lambda: slurm.ended(job), lambda: f"the end of the job\n{slurm.said()}", 60)
    until(lambda: slurm.left() == [], lambda: f"the end of {slurm.left()}", 60)
