"""A run on the hosts of a lab, as its user starts it: an agent on each host, the launcher on the first."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from deadlines import patience
from harness import ROOT, steps, topology
from lab import Host, Lab, until

SECRET = "the secret of a lab, which nobody has to guess"
FENCE_S, LOST_S = 15.0, 25.0
"""Longer than a busy machine keeps an agent waiting, shorter than a test wants to wait for a lost host."""
PORT = 19999


def settings(inputs: Path, runs: Path, nodes: int, **changes: Any) -> dict[str, Any]:
    """A topology of the small models on `nodes` hosts, each with room for one engine or rank."""
    cluster = {"backend": "agents", "nodes": nodes, "slots_per_node": 1, "fence_s": FENCE_S, "lost_s": LOST_S}
    cluster |= {"node_back_s": patience(120), "join_s": patience(60)}
    return topology(inputs, runs, **{"cluster": cluster, **changes})


class ClusterRun:
    """The processes that a user starts on the hosts of `lab`; the first host is the launcher's."""

    def __init__(
        self, lab: Lab, folder: Path, values: dict[str, Any] | Path, *options: str, others: Sequence[str] = ()
    ) -> None:
        """Agents are started on the `others`, or on every host but the first."""
        self.lab = lab
        self.first, *self.others = lab.hosts.values()
        self.others = [lab[name] for name in others] or self.others
        self.folder = folder
        self._env = {"OPD_CLUSTER_SECRET": SECRET, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.agents = {host.name: self.agent(host) for host in self.others}
        file = folder / "run.yaml" if isinstance(values, dict) else values
        if isinstance(values, dict):
            file.write_text(yaml.safe_dump(values))
        words = [sys.executable, "-m", "opd_async.launch", "--topology", str(file), *options]
        self.output = folder / f"launcher.{time.monotonic_ns()}.out"
        self.process = self.first.start(words, self._env, self.output)

    def agent(
        self, host: Host, wait_s: float = 30.0, folder: Path | None = None, **env: str
    ) -> subprocess.Popen[bytes]:
        """Start the agent of a host, in `folder` or the launcher's; its output is added to `<host>.out`."""
        words = [sys.executable, "-m", "opd_async.agent", "--join", f"{self.first.name}:{PORT}"]
        words += ["--wait-s", f"{wait_s:g}"]
        return host.start(words, {**self._env, **env}, self.folder / f"{host.name}.out", folder)

    def said(self) -> str:
        """What launcher and agents have printed."""
        outs = [self.output, *sorted(self.folder.glob("h*.out"))]
        return "\n".join(f"--- {out.name}\n{out.read_text()}" for out in outs if out.exists())

    def wait_for_steps(self, folder: Path, count: int) -> None:
        """Return once `count` steps are in metrics.jsonl; the launcher gives up on a run that does not move."""
        while len(steps(folder)) < count:
            ended = self.process.poll() is not None and len(steps(folder)) < count
            assert not ended, f"the run ended early:\n{self.said()}"
            time.sleep(0.1)

    def wait_for_text(self, words: str, deadline_s: float = 60.0) -> None:
        """Return once the launcher or an agent has printed `words`."""
        until(
            lambda: words in self.said() or self.process.poll() is not None,
            lambda: f"{words!r} in\n{self.said()}",
            deadline_s,
        )
        assert words in self.said(), f"the launcher ended before {words!r}:\n{self.said()}"

    def end(self, deadline_s: float = 240.0) -> int:
        """The launcher's exit code; its agents end too."""
        try:
            code = self.process.wait(patience(deadline_s))
            for agent in self.agents.values():
                agent.wait(patience(30))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not at its end in {patience(deadline_s):.0f} s:\n{self.said()}") from None
        return code

    def left(self) -> list[str]:
        """Command lines of processes that are still there on any host; those that are ending have a moment for it."""
        give_up = time.monotonic() + patience(5)
        while (found := self._there()) and time.monotonic() < give_up:
            time.sleep(0.1)
        return found

    def _there(self) -> list[str]:
        return [
            f"{host.name}: {' '.join(process.info['cmdline'] or [])}"  # as it was found: it may have ended since
            for host in self.lab.hosts.values()
            for process in host.processes()
        ]
