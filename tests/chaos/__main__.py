"""Faults at random, run after run, and what became of them.

    python tests/chaos [--faults 24] [--seed N] [--per-run 8] [--minutes M] [--json FILE]

Each run is of another regime; it gets some faults of random kinds, one after the other, is stopped by Ctrl-C, and
audited: tokens twice or lost, staleness, checksums of its checkpoints, processes, ports, files and shared memory that
are left. The exit code is 1 if anything is wrong. The seed says which faults come; what they meet depends on timing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e"), str(HERE.parent), str(HERE.parents[1])]

from audit import Audit, audit_run, shared_memory  # noqa: E402
from faults import Kind, kinds  # noqa: E402
from harness import SLOTS, make_inputs  # noqa: E402
from live import Live, Wrong  # noqa: E402
from regimes import REGIMES, Regime, values_of  # noqa: E402


@dataclass(slots=True)
class Score:
    """What became of the faults of one kind."""

    thrown: int = 0
    survived: int = 0
    next_s: list[float] = field(default_factory=list)
    full_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Total:
    """What became of all of them."""

    kinds: dict[str, Score] = field(default_factory=lambda: defaultdict(Score))
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    twice: int = 0
    lost: int = 0
    runs: int = 0

    @property
    def thrown(self) -> int:
        """Faults so far."""
        return sum(score.thrown for score in self.kinds.values())


class Deck:
    """Kinds in random order, each once before any comes again."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._cards: list[Kind] = []

    def draw(self, regime: Regime) -> Kind:
        """The next kind that this regime has the roles for."""
        for _ in range(2):
            for kind in self._cards:
                if set(kind.roles) <= set(regime.roles):
                    self._cards.remove(kind)
                    return kind
            self._cards += self._chance.sample(kinds(), len(kinds()))
        raise AssertionError("every regime has roles")


def throw(live: Live, kind: Kind, chance: random.Random, total: Total) -> None:
    """One fault; raises `Wrong` if the run does not take it as it should."""
    score = total.kinds[kind.name]
    live.measure()
    moment = time.time()
    score.thrown += 1
    kind.act(live, chance)
    score.next_s.append(live.step_after(moment))
    full = live.speed_after(moment)
    if full is not None:
        score.full_s.append(full)
    score.survived += 1


def one_run(
    regime: Regime, faults: int, deck: Deck, chance: random.Random, root: Path, total: Total, until: float
) -> None:
    """A run of one regime, `faults` faults or as many as there is time for, an orderly end, an audit."""
    inputs = root / "inputs"
    folder = root / f"run-{total.runs}"
    folder.mkdir()
    total.runs += 1
    before = shared_memory()
    thrown: list[str] = []
    with Live(folder, values_of(regime, inputs, folder)) as live:
        try:
            live.step_after(time.time())
            live.sealed(1)
            for index in range(faults):
                if index and time.monotonic() > until:
                    break
                time.sleep(chance.uniform(0.0, 1.0))
                kind = deck.draw(regime)
                thrown.append(kind.name)
                print(f"  {regime.name}: {kind.name}", flush=True)
                throw(live, kind, chance, total)
            live.stop()
        except (Wrong, AssertionError) as error:
            total.wrong.append(f"{regime.name}, after {', '.join(thrown) or 'the start'}: {error}")
            return
        found = audit_run(live.folder, regime.bound, 2 * SLOTS)
        found.left += live.left + [f"shared memory: {path}" for path in sorted(shared_memory() - before)]
        _add(found, regime, thrown, total)


def _add(found: Audit, regime: Regime, thrown: Sequence[str], total: Total) -> None:
    total.tokens += found.tokens
    total.twice += found.twice
    total.lost += found.lost
    if found.wrong:
        total.wrong.append(f"{regime.name}, after {', '.join(thrown)}: {'; '.join(found.wrong)}")


def table(total: Total) -> str:
    """A line for each kind, and the sums."""
    lines = [f"{'fault':<42}{'thrown':>7}{'survived':>9}{'next step (s)':>15}{'full speed (s)':>15}"]
    for name, score in sorted(total.kinds.items()):
        middle = [f"{statistics.median(part):.1f}" if part else "-" for part in (score.next_s, score.full_s)]
        lines.append(f"{name:<42}{score.thrown:>7}{score.survived:>9}{middle[0]:>15}{middle[1]:>15}")
    scores = total.kinds.values()
    every = [[one for score in scores for one in part(score)] for part in (lambda s: s.next_s, lambda s: s.full_s)]
    middle = [f"{statistics.median(part):.1f}" if part else "-" for part in every]
    survived = sum(score.survived for score in scores)
    head = f"{len(total.kinds)} kinds in {total.runs} runs"
    lines.append(f"{head:<42}{total.thrown:>7}{survived:>9}{middle[0]:>15}{middle[1]:>15}")
    lines.append(f"{total.tokens:,} tokens trained: {total.twice} twice, {total.lost} lost")
    return "\n".join([*lines, *(f"WRONG: {text}" for text in total.wrong)])


def main(argv: Sequence[str] | None = None) -> int:
    """Throw, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python tests/chaos", description="Throw faults at runs.")
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--per-run", type=int, default=8)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--minutes", type=float, default=1e6, help="throw nothing later than this")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args(argv)
    chance, total, began = random.Random(arguments.seed), Total(), time.monotonic()
    deck = Deck(chance)
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="opd-chaos-") as name:
        root = Path(name)
        (root / "inputs").mkdir()
        make_inputs(root / "inputs")
        until = began + 60 * arguments.minutes
        while total.thrown < arguments.faults and time.monotonic() < until:
            count = min(arguments.per_run, arguments.faults - total.thrown)
            one_run(REGIMES[total.runs % len(REGIMES)], count, deck, chance, root, total, until)
    print(f"{table(total)}\n{time.monotonic() - began:.0f} s, seed {arguments.seed}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_values(total), indent=1))
    return 1 if total.wrong else 0


def _values(total: Total) -> dict[str, Any]:
    scores = {name: [score.thrown, score.survived, score.next_s, score.full_s] for name, score in total.kinds.items()}
    return {"kinds": scores, "tokens": total.tokens, "twice": total.twice, "lost": total.lost, "wrong": total.wrong}


if __name__ == "__main__":
    sys.exit(main())
