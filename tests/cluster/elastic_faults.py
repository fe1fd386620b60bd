"""Faults at random moments while a host joins a run or is drained, and what became of them.

    python tests/cluster/elastic_faults.py [--faults 10] [--seed N] [--only WORDS]

One run on three hosts of a lab, and a fourth one that comes and goes. Each fault is of another kind, in an order and at
moments that are drawn; the seed says which, what they meet depends on timing. In the end the run is stopped by Ctrl-C:
every token must have been trained once, in order, within the bound, and nothing may be left on any host. The exit code
is 1 where that is not so, or the run does not go on.

Needs root (`lab.py`). A fault takes about a minute: most of it is the silence after which a host is given up.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e"), str(HERE.parent), str(HERE.parents[1])]

from cluster_run import FENCE_S, LOST_S, ClusterRun, settings  # noqa: E402
from deadlines import patience  # noqa: E402
from harness import check_trained, make_inputs, steps  # noqa: E402
from lab import Host, Lab, until  # noqa: E402

FOUR = ("h0", "h1", "h2", "h3")
NEW = "h3"
INTAKE_ENDED = r"intake\S* ended \("
LATEST_S = 4.0
"""A fault comes so long after the join or the drain has begun, at most."""


class Elastic:
    """A run on three hosts, and a fourth one that comes and goes."""

    def __init__(self, lab: Lab, run: ClusterRun, folder: Path, chance: random.Random) -> None:
        self.lab, self.run, self.folder, self._chance = lab, run, folder, chance
        self._drained = False

    @property
    def new(self) -> Host:
        return self.lab[NEW]

    def moment(self) -> None:
        """Some time passes."""
        time.sleep(self._chance.uniform(0, LATEST_S))

    def wait(self, words: str, before: int) -> None:
        """Return once the launcher has said it more often than `before`."""
        until(
            lambda: self.said(words) > before or self.run.process.poll() is not None,
            lambda: f"{words!r} once more than {before} times in\n{self.run.said()}",
            120,
        )
        assert self.said(words) > before, self.run.said()

    def said(self, words: str) -> int:
        """How often the launcher has said what this pattern finds."""
        return len(re.findall(words, self.run.output.read_text()))

    def more(self, count: int) -> None:
        """The run moves on, by so many steps beside one that may have been under way."""
        self.run.wait_for_steps(self.folder, len(steps(self.folder)) + count + 1)

    def drain(self, *options: str) -> subprocess.Popen[str]:
        """`opd drain` of the fourth host, which goes on in the background."""
        words = [sys.executable, "-m", "opd_async.cli", "drain", *options, str(self.folder), NEW]
        pipe = subprocess.PIPE
        return subprocess.Popen(self.lab["h0"].command(words), stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def drained(self, asked: subprocess.Popen[str], *codes: int) -> int:
        """Its end, with one of these exit codes."""
        said, _ = asked.communicate(timeout=patience(180))
        assert asked.returncode in codes, f"{said}\n{self.run.said()}"
        return asked.returncode

    def begin_join(self) -> int:
        """An agent is started on the fourth host, which begins to join; how often it had taken part before."""
        if self._drained:
            self.drained(self.drain("--undo"), 0)
            self._drained = False
        joins, takes_part = self.said(f"{NEW} joins"), self.said(f"{NEW} takes part")
        self.run.agents[NEW] = self.run.agent(self.new, patience(600))
        self.wait(f"{NEW} joins", joins)
        return takes_part

    def join(self) -> None:
        """The fourth host joins in order."""
        self.wait(f"{NEW} takes part", self.begin_join())

    def leave(self) -> None:
        """It leaves in order."""
        self.drained(self.drain(), 0)
        self._drained = True
        assert self.run.agents[NEW].wait(patience(60)) == 0
        assert self.new.processes() == []

    def is_away(self) -> None:
        """It was drained while something went wrong; whatever of its agent is left waits, and ends."""
        self._drained = True
        self.new.signal("opd_async.agent", signal.SIGTERM)
        until(lambda: self.new.processes() == [], lambda: "the fourth host to be empty", 60)


def cut_while_it_joins(run: Elastic) -> None:
    """For good: it is given up, and takes part when it is back."""
    before, lost = run.begin_join(), run.said(f"{NEW} is lost")
    run.moment()
    run.new.cut()
    run.wait(f"{NEW} is lost", lost)
    run.more(2)
    run.new.heal()
    run.wait(f"{NEW} takes part", before)
    run.more(2)
    run.leave()


def agent_killed_while_it_joins(run: Elastic) -> None:
    """With all that it has started; another one is started."""
    before = run.begin_join()
    run.moment()
    run.new.signal("opd_async.agent", signal.SIGKILL)
    until(lambda: run.new.processes() == [], lambda: "the kernel to end what the agent had started", 60)
    back = run.said(f"{NEW} is back")
    run.run.agents[NEW] = run.run.agent(run.new, patience(600))
    run.wait(f"{NEW} is back", back)
    run.wait(f"{NEW} takes part", before)
    run.more(2)
    run.leave()


def intake_killed_while_it_joins(run: Elastic) -> None:
    """The run goes back to its checkpoint, with it or without, and has it in the end."""
    before, ends = run.begin_join(), run.said(INTAKE_ENDED)
    run.moment()
    run.lab["h0"].signal("opd_async.actors.intake", signal.SIGKILL)
    run.wait(INTAKE_ENDED, ends)
    run.wait(f"{NEW} takes part", before)
    run.more(2)
    run.leave()


def actor_killed_while_it_is_drained(run: Elastic) -> None:
    """It leaves all the same."""
    run.join()
    run.more(1)
    asked = run.drain()
    run.moment()
    run.new.signal("opd_async.actors.rollout", signal.SIGKILL)
    run.drained(asked, 0)
    run.is_away()
    run.more(2)


def cut_while_it_is_drained(run: Elastic) -> None:
    """It cannot be told to end: it is fenced, and left out. One that is given up first is refused."""
    run.join()
    run.more(1)
    asked = run.drain()
    run.moment()
    run.new.cut()
    code = run.drained(asked, 0, 2)
    run.more(2)
    time.sleep(LOST_S - FENCE_S)
    back = run.said(f"{NEW} is back")
    run.new.heal()
    if code:  # lost before it could leave
        run.wait(f"{NEW} is back", back)
        run.leave()
    else:
        run.is_away()
    run.more(2)


KINDS: tuple[Callable[[Elastic], None], ...] = (
    cut_while_it_joins,
    agent_killed_while_it_joins,
    intake_killed_while_it_joins,
    actor_killed_while_it_is_drained,
    cut_while_it_is_drained,
)


def faults(root: Path, count: int, chance: random.Random, kinds: list[Callable[[Elastic], None]]) -> None:
    """So many of them in one run, each kind as often as any other; `AssertionError` says what is wrong."""
    values = settings(make_inputs(root / "inputs"), root, 3, schedule__steps=100_000, supervisor__restarts=100)
    values["cluster"]["spare_nodes"] = 1
    folder, drawn = root / "run", list[Callable[[Elastic], None]]()
    with Lab(FOUR) as lab:
        run = ClusterRun(lab, root, values, others=FOUR[1:3])
        run.wait_for_steps(folder, 2)
        elastic = Elastic(lab, run, folder, chance)
        for _ in range(count):
            drawn = drawn or chance.sample(kinds, len(kinds))
            began, kind = time.monotonic(), drawn.pop()
            print(f"{kind.__name__} ...", end=" ", flush=True)
            kind(elastic)
            print(f"{time.monotonic() - began:.0f} s", flush=True)
        lab["h0"].signal("opd_async.launch", signal.SIGINT)
        assert run.end() == 130, run.said()
        assert run.left() == [], run.left()
    done = steps(folder)
    check_trained(folder, 1, len(done))
    print(f"{sum(row['tokens'] for row in done):,} tokens in {len(done)} steps, 0 twice, 0 lost")


def main() -> None:
    """Throw them, and say what became of them."""
    parser = argparse.ArgumentParser(
        prog="python tests/cluster/elastic_faults.py", description="Faults while a host comes and goes."
    )
    parser.add_argument("--faults", type=int, default=2 * len(KINDS))
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--only", default="", help="kinds whose name has one of these words, with commas between them")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if any(word in kind.__name__ for word in options.only.split(","))]
    if not kinds:
        parser.error(f"--only {options.only}: write words of {', '.join(kind.__name__ for kind in KINDS)}")
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as name:
        try:
            faults(Path(name), options.faults, random.Random(options.seed), kinds)
        except AssertionError as error:
            print(f"wrong: {error}")
            sys.exit(1)


if __name__ == "__main__":
    main()
