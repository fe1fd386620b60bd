"""Hosts that are cut off, unplugged and killed, without torch: what runs where, at which time, and what is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deadlines import patience
from harness import ROOT
from lab import Lab, until

FENCE_S, LOST_S = 12.0, 24.0
"""What is between them a busy machine may keep an agent from obeying its fence."""
TRIES = 5
SECRET = "the secret of a lab, which nobody has to guess"
SLEEPER = "one that only sleeps"


class Sleepers:
    """`sleepers.py` on the first host, an agent on each other one."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self._env = {"OPD_CLUSTER_SECRET": SECRET, "PYTHONPATH": str(ROOT)}
        script = Path(__file__).with_name("sleepers.py")
        words = [sys.executable, str(script), str(folder), str(len(lab.hosts)), str(FENCE_S), str(LOST_S)]
        self.launcher = lab["h0"].start(words, self._env, folder / "launcher.out")
        self.agents = {name: self.agent(name) for name in lab.hosts if name != "h0"}

    def agent(self, name: str, *options: str, **env: str) -> subprocess.Popen[bytes]:
        """Start the agent of a host."""
        words = [sys.executable, "-m", "opd_async.agent", "--join", "h0:19999", "--wait-s", "20", *options]
        return self.lab[name].start(words, {**self._env, **env}, self.folder / f"{name}.out")

    def said(self) -> str:
        """What everybody has printed."""
        return "\n".join(f"--- {out.name}\n{out.read_text()}" for out in sorted(self.folder.glob("*.out")))

    def count(self, words: str) -> int:
        """How often the launcher has printed this."""
        return (self.folder / "launcher.out").read_text().count(words)

    def wait(self, words: str, times: int = 1) -> None:
        """Return once the launcher has printed it so often."""
        until(lambda: self.count(words) >= times, lambda: f"{words!r} {times} times in\n{self.said()}")

    def asleep(self, name: str) -> int:
        """How many sleepers are on a host."""
        return len(self.lab[name].processes(SLEEPER))

    def left(self) -> int:
        """Processes on all hosts."""
        return sum(len(host.processes()) for host in self.lab.hosts.values())


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[Sleepers]:
    with Lab(("h0", "h1", "h2")) as lab:
        run = Sleepers(lab, tmp_path)
        for name in ("here", "on-h1", "on-h2"):
            run.wait(f"started {name}")
        yield run


def in_time(sleepers: Sleepers, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Keep h1 from the others for so short a time that nothing may come of it.

    On a busy machine it may have been longer than it should: then whatever came of it is over soon, and it is tried
    again.
    """
    for _ in range(TRIES):
        before, began = sleepers.count("ended"), time.monotonic()
        begin()
        time.sleep(FENCE_S / 4)
        end()
        took_s = time.monotonic() - began
        # the beat that follows has to be answered before the lease is out, else this host would be fenced
        time.sleep(FENCE_S)
        if took_s < FENCE_S / 2:
            assert sleepers.count("ended") == before and sleepers.asleep("h1") == 1, sleepers.said()
            return
        until(
            lambda: sleepers.count("started on-h1") == sleepers.count("ended on-h1") + 1 and sleepers.asleep("h1") == 1,
            sleepers.said,
        )
    raise AssertionError(f"no partition of {FENCE_S / 4:g} s was shorter than {FENCE_S / 2:g} s on this machine")


def time_of(words: str, output: Path) -> time.struct_time:
    """When a line with these words was last printed."""
    line = [line for line in output.read_text().splitlines() if words in line][-1]
    return time.strptime(line.split()[0], "%H:%M:%S")


def test_a_partition_in_time_changes_nothing_and_a_longer_one_is_fenced(sleepers: Sleepers) -> None:
    h1 = sleepers.lab["h1"]
    in_time(sleepers, h1.cut, h1.heal)
    in_time(sleepers, h1.unplug, h1.plug)

    started, lost = sleepers.count("started on-h1"), sleepers.count("h1 is lost")
    h1.cut()
    sleepers.wait("h1 is lost", lost + 1)
    sleepers.wait("ended on-h1: -9 its host h1 was lost", lost + 1)
    until(lambda: sleepers.asleep("h1") == 0, lambda: "the fence of h1")
    outputs = sleepers.folder / "h1.out", sleepers.folder / "launcher.out"
    assert time_of("was not heard", outputs[0]) <= time_of("h1 is lost", outputs[1]), "fenced before it is given up"
    h1.heal()
    sleepers.wait("h1 is back", lost + 1)
    sleepers.wait("started on-h1", started + 1)
    assert [sleepers.asleep(name) for name in ("h0", "h1", "h2")] == [1, 1, 1]

    (sleepers.folder / "stop").touch()
    assert sleepers.launcher.wait(patience(60)) == 0
    assert [agent.wait(patience(60)) for agent in sleepers.agents.values()] == [0, 0], sleepers.said()
    assert sleepers.left() == 0


def test_a_power_cut_a_killed_agent_and_a_killed_launcher_leave_nothing(sleepers: Sleepers) -> None:
    h1, h2 = sleepers.lab["h1"], sleepers.lab["h2"]
    h2.power_off()
    sleepers.wait("ended on-h2: -9 its host h2 was lost")

    h1.signal("opd_async.agent", signal.SIGKILL)
    until(lambda: not h1.processes(), lambda: "the kernel to end what the agent had started")
    sleepers.agents["h1"] = sleepers.agent("h1")
    sleepers.wait("started on-h1", 2)
    assert sleepers.asleep("h1") == 1

    sleepers.lab["h0"].signal("sleepers.py", signal.SIGKILL)
    until(lambda: not sleepers.lab["h0"].processes(), lambda: "the launcher's own processes")
    until(lambda: sleepers.asleep("h1") == 0, lambda: f"the fence of h1\n{sleepers.said()}")
    assert sleepers.agents["h1"].wait(patience(60)) == 1 and sleepers.left() == 0
    assert "no launcher has answered for 20 s" in (sleepers.folder / "h1.out").read_text()


def test_strangers_are_turned_away_in_words(sleepers: Sleepers) -> None:
    other = sleepers.agent("h1", OPD_CLUSTER_SECRET="another secret, of whomever it may be")
    assert other.wait(patience(10)) == 1, "a wrong secret is noticed within 10 s where it is"
    namesake = sleepers.agent("h2", "--name", "h1")
    assert namesake.wait(patience(60)) == 2
    web = "import urllib.request; urllib.request.urlopen('http://h0:19999/', timeout=60)"
    assert subprocess.run(
        sleepers.lab["h2"].command([sys.executable, "-c", web]), capture_output=True, check=False
    ).returncode
    said = sleepers.said()
    assert "10.88.0.10:19999 does not let this agent in: the cluster's secret differs" in said
    assert "another agent, at 10.88.0.11, serves h1 already; give this host another --name" in said
    assert sleepers.count("ended") == 0 and SECRET not in said
    assert sleepers.asleep("h1") == 1 == sleepers.asleep("h2")
