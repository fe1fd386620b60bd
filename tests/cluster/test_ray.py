"""Runs on a real Ray, a node on each host of a lab: jobs, agents in actors, what dies, what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_daemons
import yaml
from cluster_run import LOST_S, settings
from deadlines import patience
from harness import ROOT, check_trained, steps
from lab import Lab, until

THREE = ("h0", "h1", "h2")
SCRIPT = ROOT / "examples/cluster/ray.sh"
SECRET_ENV = "OPD_CLUSTER_SECRET"


class RayLab:
    """Three hosts with Ray; everything is asked for on the first, its head."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.env = ray_daemons.start(lab)

    def settings(self, inputs: Path, folder: Path, **changes: Any) -> Path:
        """A topology on three nodes; an agent that does not see two GPUs is refused."""
        values = settings(inputs, folder, 3, **changes)
        values["cluster"] |= {"ray_python": str(ray_daemons.PYTHON), "gpus_per_node": 2}
        del values["cluster"]["backend"]
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(values))
        return file

    def launch(self, file: Path, *changes: str) -> list[str]:
        """The command of a launcher on this cluster."""
        words = [sys.executable, "-m", "opd_async.launch", "--topology", str(file)]
        return [*words, *(word for change in ("cluster.backend=ray", *changes) for word in ("--set", change))]

    def ask(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the first host to its end."""
        return subprocess.run(
            self.lab["h0"].command(words),
            env={**os.environ, **self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=patience(120),
        )

    def left(self) -> list[str]:
        """Command lines of what is on any host and is no daemon of Ray's."""
        hosts = self.lab.hosts.values()
        lines = [(host.name, " ".join(process.info["cmdline"])) for host in hosts for process in host.processes()]
        return [f"{name}: {line}" for name, line in lines if line and not ray_daemons.is_daemon(line)]


@pytest.fixture(scope="module")
def ray() -> Iterator[RayLab]:
    """One cluster for all."""
    with Lab(THREE) as lab:
        yield RayLab(lab)


def test_a_job_survives_its_actor_and_its_driver(ray: RayLab, inputs: Path, tmp_path: Path) -> None:
    """The shipped script; an actor of Ray is killed, then the process that holds all of them; on to the end."""
    file, folder, output = ray.settings(inputs, tmp_path, schedule__steps=24), tmp_path / "run", tmp_path / "job.out"
    env = {**ray.env, "RAY_ADDRESS": f"http://{ray.lab['h0'].address}:{ray_daemons.JOBS}"}
    env |= {"OPD": str(Path(sys.executable).with_name("opd")), "RAY": str(ray_daemons.RAY)}
    job = ray.lab["h0"].start([str(SCRIPT), str(file)], env, output)

    def wait_for(words: str, times: int = 1, deadline_s: float = 60) -> None:
        until(
            lambda: output.read_text().count(words) >= times, lambda: f"{words!r} in\n{output.read_text()}", deadline_s
        )

    def moved(count: int) -> None:
        until(lambda: len(steps(folder)) >= count or job.poll() is not None, output.read_text, 180)
        assert len(steps(folder)) >= count, output.read_text()

    wait_for("by Ray", 1, 90)
    moved(2)
    agents = {name: host.processes("opd_async.agent", "--join") for name, host in ray.lab.hosts.items()}
    assert [len(agents[name]) for name in THREE] == [0, 1, 1]
    secret = agents["h2"][0].environ()[SECRET_ENV]
    everything = [process for host in ray.lab.hosts.values() for process in host.processes()]
    assert len(secret) == 64 and not any(secret in " ".join(process.info["cmdline"]) for process in everything)

    ray.lab["h2"].signal("ray::Leash", 9)
    until(lambda: not [line for line in ray.left() if line.startswith("h2")], lambda: f"{ray.left()}", LOST_S / 2)
    wait_for("h2 is lost", 1, LOST_S + 30)
    wait_for("h2 is back")
    moved(len(steps(folder)) + 2)
    ray.lab["h0"].signal("ray_driver.py", 9)  # the end of every agent, and another one starts them again
    wait_for("is lost", 3, LOST_S + 30)
    wait_for("is back", 3)
    assert job.wait(patience(240)) == 0, output.read_text()
    check_trained(folder, 1, 24)
    report = json.loads((folder / "report.json").read_text())
    assert {"teacher-0", "rollout-0"} <= report["restarts"].keys() and "learner-0" not in report["restarts"]
    until(lambda: ray.left() == [], lambda: f"the end of {ray.left()}", 30)
    texts = [*(folder / "logs").glob("*.log"), output, folder / "plan.json"]
    assert len(texts) > 6 and not any(secret in text.read_text() for text in texts)
    for host in ray.lab.hosts.values():
        logs = host.run(["sh", "-c", f"cat /run/ray/session_*/logs/* 2>/dev/null | grep -c {secret} || true"])
        assert logs.strip() == "0", "Ray's own logs"


def test_what_cannot_start_is_said_and_a_killed_launcher_leaves_nothing(
    ray: RayLab, inputs: Path, tmp_path: Path
) -> None:
    """No Ray, no cluster, too few nodes, a Python that is not there; its bundles are free once a launcher is gone."""
    file = ray.settings(inputs, tmp_path)
    for changes, env, words in (
        ((f"cluster.ray_python={sys.executable}",), {}, f"cluster.backend: ray, and {sys.executable} has no Ray"),
        ((), {"RAY_ADDRESS": f"{ray.lab['h0'].address}:7777"}, "ray, and no Ray cluster can be used from here"),
        (
            ("cluster.nodes=4", "cluster.join_s=3"),
            {},
            "cluster.nodes: 4, and in 3 s Ray has not found room on so many",
        ),
        (("cluster.gpus_per_node=8", "cluster.join_s=3"), {}, "each is to give 8 GPU, and the cluster has 3 nodes, h"),
    ):
        done = ray.ask(*ray.launch(file, *changes), **env)
        assert done.returncode == 2 and words in done.stdout, done.stdout

    output = tmp_path / "launcher.out"
    launcher = ray.lab["h0"].start(ray.launch(file, "cluster.gpus_per_node=4"), ray.env, output)
    until(lambda: len(steps(tmp_path / "run")) >= 1 or launcher.poll() is not None, output.read_text, 180)
    assert launcher.poll() is None and len(ray.left()) > 6, output.read_text()
    ray.lab["h0"].signal("opd_async.launch", 9)
    until(lambda: ray.left() == [], lambda: f"the end of {ray.left()}", 30)

    done = ray.ask(*ray.launch(file, "cluster.gpus_per_node=4", "cluster.python=/no/python", "name=other"))
    assert done.returncode == 2 and "ray, and an agent has not stayed on its node: h" in done.stdout, done.stdout
    assert "/no/python" in done.stdout and not (tmp_path / "other").exists()
    until(lambda: ray.left() == [], lambda: f"the end of {ray.left()}", 30)
