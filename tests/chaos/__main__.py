"""Faults at random, run after run, and what became of them.

    python tests/chaos [--faults 24] [--seed N] [--per-run 24] [--minutes M] [--only WORDS] [--runs WORDS]
                        [--json FILE]

Each run is of another regime; it gets some faults of random kinds, one after the other, is stopped by Ctrl-C, and
audited: tokens twice or lost, staleness, checksums of its checkpoints, processes, ports, files and shared memory that
are left. The exit code is 1 if anything is wrong. The seed says which faults come; what they meet depends on timing.

A fault that a run has not survived is thrown once more, at a run of its own, which says whether it was that fault or
what came before it; one or two that are survived there are named and to be mended, and the exit code is 0. What an
audit finds stays wrong, and so does a defect of the program.

As root it has a network and temporary folders of its own (`island.py`): only there are networks cut.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "e2e"), str(HERE.parent), str(HERE.parents[1])]

from audit import Audit, audit_run  # noqa: E402
from deck import Deck  # noqa: E402
from doubts import Doubt, wrong_of  # noqa: E402
from external import External  # noqa: E402
from harness import ROOT, make_inputs, make_model  # noqa: E402
from island import Island, make_island  # noqa: E402
from kinds import QUICK, Kind, kinds  # noqa: E402
from live import KEY, Live, Wrong  # noqa: E402
from regimes import REGIMES, Regime, values_of  # noqa: E402

ALONE, ALONE_MINUTES = 2, 5.0
"""How often a fault that was not survived is thrown once more, and for how long at most."""


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
    doubts: list[Doubt] = field(default_factory=list)
    tokens: int = 0
    given: int = 0
    twice: int = 0
    lost: int = 0
    runs: int = 0

    @property
    def thrown(self) -> int:
        """Faults so far."""
        return sum(score.thrown for score in self.kinds.values())


def throw(live: Live, kind: Kind, chance: random.Random, total: Total) -> None:
    """One fault; raises `Wrong` if the run does not take it as it should."""
    score = total.kinds[kind.name]
    live.measure()
    moment = time.time()
    score.thrown += 1
    kind.act(live, chance)
    score.next_s.append(live.step_after(moment))
    full = live.speed_after(moment) if kind.often < QUICK else None
    if full is not None:
        score.full_s.append(full)
    score.survived += 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Chaos:
    """Where runs take place, what is thrown, and until when (`time.monotonic`)."""

    root: Path
    island: Island
    deck: Deck
    chance: random.Random
    until: float

    def run(self, regime: Regime, faults: int, total: Total) -> None:
        """A run of one regime, `faults` faults or as many as there is time for, an orderly end, an audit."""
        inputs, folder = self.root / "inputs", self.root / f"run-{total.runs}"
        folder.mkdir()
        total.runs += 1
        before = self.island.present()
        thrown: list[str] = []
        with ExitStack() as stack:
            external = stack.enter_context(External(inputs / "student", KEY)) if regime.external else None
            values = values_of(regime, inputs, folder, () if external is None else (external.url,))
            live = stack.enter_context(Live(folder, values, regime.roles, self.island, external))
            try:
                self._throw_all(live, regime, faults, thrown, total)
                live.stop()
            except (Wrong, AssertionError) as error:
                text = f"{regime.name}, after {', '.join(thrown) or 'the start'}: {error}"
                total.doubts.append(Doubt(regime, thrown[-1] if thrown else "", text))
                total.wrong += [f"{regime.name}: {one}" for one in live.left]
                print(f"WRONG: {text}", flush=True)
                return
            found = audit_run(live.folder, regime.bound, regime.in_flight)
            found.left += live.left
        found.left += self.island.left_since(before)
        if found.wrong:
            print(live.text()[-5000:], flush=True)
        _add(found, regime, thrown, total)

    def survives(self, doubt: Doubt, total: Total) -> bool:
        """Whether a run that gets nothing else survives that fault, `ALONE` times."""
        print(f"once more, alone: {doubt.kind or 'the start'}", flush=True)
        deck = Deck(self.chance, [kind for kind in self.deck.kinds if doubt.kind in ("", kind.name)])
        alone = replace(self, deck=deck, until=time.monotonic() + 60 * ALONE_MINUTES)
        before = len(total.doubts) + len(total.wrong)
        alone.run(doubt.regime, ALONE, total)
        return len(total.doubts) + len(total.wrong) == before

    def _throw_all(self, live: Live, regime: Regime, faults: int, thrown: list[str], total: Total) -> None:
        live.step_after(time.time())
        live.sealed(1)
        for index in range(faults):
            if index and time.monotonic() > self.until:
                return
            time.sleep(self.chance.uniform(0.0, 1.0))
            kind = self.deck.draw(regime)
            thrown.append(kind.name)
            print(f"{time.strftime('%X')} {regime.name}: {kind.name}", flush=True)
            throw(live, kind, self.chance, total)


def _add(found: Audit, regime: Regime, thrown: Sequence[str], total: Total) -> None:
    total.tokens += found.tokens
    total.given += found.given
    total.twice += found.twice
    total.lost += found.lost
    if found.wrong:
        total.wrong.append(f"{regime.name}, after {', '.join(thrown)}: {'; '.join(found.wrong)}")
        print(f"WRONG: {total.wrong[-1]}", flush=True)


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
    lines.append(
        f"{total.tokens:,} tokens trained, between {total.given:,} of tools: {total.twice} twice, {total.lost} lost"
    )
    return "\n".join([*lines, *(f"WRONG: {text}" for text in total.wrong)])


def prepared(root: Path, island: Island, chance: random.Random, until: float, only: str) -> Chaos:
    """The models and prompts of every run, and the deck of the kinds that match `only`."""
    thrown = [kind for kind in kinds(island.own) if re.search(only, kind.name)]
    if not thrown:
        raise SystemExit(f"--only {only!r} matches none of: {', '.join(kind.name for kind in kinds(island.own))}")
    inputs = root / "inputs"
    inputs.mkdir()
    make_inputs(inputs)
    make_model(inputs / "other", hidden=48, layers=2, seed=3)
    return Chaos(root=root, island=island, deck=Deck(chance, thrown), chance=chance, until=until)


def main(argv: Sequence[str] | None = None) -> int:
    """Throw, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python tests/chaos", description="Throw faults at runs.")
    parser.add_argument("--faults", type=int, default=24)
    parser.add_argument("--per-run", type=int, default=24)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", default="", help="kinds whose names match this regular expression")
    parser.add_argument("--runs", default="", help="regimes whose names match this regular expression")
    parser.add_argument("--minutes", type=float, default=1e6, help="throw nothing later than this")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args(argv)
    # runs would inherit what nohup and & ignore, and have to obey both
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "hooks"), str(ROOT)])
    began, total = time.monotonic(), Total()
    # opened before the island hides the folder that it may lie in
    with (arguments.json or Path(os.devnull)).open("w", encoding="utf-8") as file:
        island = make_island((ROOT,))
        print(f"seed {arguments.seed}, {'with' if island.own else 'without'} cuts of the network", flush=True)
        with tempfile.TemporaryDirectory(prefix="opd-chaos-") as name:
            chance, until = random.Random(arguments.seed), began + 60 * arguments.minutes
            chaos = prepared(Path(name), island, chance, until, arguments.only)
            named = [regime for regime in REGIMES if re.search(arguments.runs, regime.name)]
            suited = [regime for regime in named if chaos.deck.suits(regime)]
            if not suited:
                raise SystemExit(f"--runs {arguments.runs!r} and --only {arguments.only!r} leave no run")
            while total.thrown < arguments.faults and time.monotonic() < chaos.until:
                count = min(arguments.per_run, arguments.faults - total.thrown)
                chaos.run(suited[total.runs % len(suited)], count, total)
            total.wrong += wrong_of(tuple(total.doubts), lambda doubt: chaos.survives(doubt, total))
        print(f"{table(total)}\n{time.monotonic() - began:.0f} s, seed {arguments.seed}")
        json.dump(_values(total), file, indent=1)
    return 1 if total.wrong else 0


def _values(total: Total) -> dict[str, Any]:
    scores = {name: [score.thrown, score.survived, score.next_s, score.full_s] for name, score in total.kinds.items()}
    tokens = {"tokens": total.tokens, "given": total.given, "twice": total.twice, "lost": total.lost}
    return {"kinds": scores, **tokens, "wrong": total.wrong}


if __name__ == "__main__":
    sys.exit(main())
