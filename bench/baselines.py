"""Deterministic counters of the simulation, and what they were when they were last accepted.

    python -m bench.baselines [--write]

`compare` names what got worse by more than `TOLERANCE`; tests/bench/test_bench_baselines.py fails then. `--write`
accepts the present figures, which belongs into the commit that explains them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from opd_async.bench.sim.figures import Row
from opd_async.bench.sim.presets import balanced
from opd_async.bench.sim.rules import (
    Rule,
    Scoring,
    deadline_cuts,
    filled,
    one_step_off,
    partial_rollouts,
    sample_stream,
)
from opd_async.bench.sim.simulation import Simulation
from opd_async.files import write_atomically

FILE = Path(__file__).parent / "baselines" / "schedules.json"
TOLERANCE = 0.05
HIGHER_IS_BETTER = ("share_of_bound",)
LOWER_IS_BETTER = (
    "age_mean",
    "age_max",
    "score_p99_s",
    "teacher_recompute",
    "learner_recompute",
    "bubble",
    "step_tokens",
    "step_tokens_max",
    "age_budgets_max",
)

Counters = dict[str, dict[str, float]]
"""Run -> counter -> value."""

WORKLOADS = {
    "balanced": balanced(slots=64),
    "fast learner": balanced(slots=64, learner=2.0),
    "two a slot": balanced(slots=64, ratio=2.0),
}
"""A quarter of the slots of the presets: these runs are part of the tests."""
CASES: tuple[tuple[str, Rule], ...] = (
    ("balanced", one_step_off()),
    ("balanced", sample_stream(1)),
    ("balanced", deadline_cuts(1)),
    ("balanced", deadline_cuts(2)),
    ("balanced", deadline_cuts(4)),
    ("fast learner", deadline_cuts(1)),
    ("balanced", partial_rollouts()),
    *(("balanced", filled(staleness)) for staleness in (0, 1, 2, 4, None)),
    ("two a slot", filled(1)),
    ("fast learner", filled(1)),
)


def run(workload: str, rule: Rule) -> Row:
    """One short simulation with streamed scoring."""
    return Simulation(WORKLOADS[workload], rule, Scoring.STREAMED).run(warmup=6, steps=10)


def counters() -> Counters:
    """The present figures."""
    names = (*HIGHER_IS_BETTER, *LOWER_IS_BETTER)
    return {
        f"{workload} {rule.name} {rule.staleness}": {name: getattr(row, name) for name in names}
        for workload, rule in CASES
        for row in [run(workload, rule)]
    }


def compare(before: Counters, now: Counters) -> Iterator[str]:
    """What got worse, or is missing."""
    for case, old in before.items():
        for name, value in old.items():
            current = now.get(case, {}).get(name)
            if current is None:
                yield f"{case}: no {name} any more"
                continue
            if name.startswith("step_tokens") and current <= 1 + TOLERANCE:
                continue  # as large as it should be
            worse = value - current if name in HIGHER_IS_BETTER else current - value
            if worse > TOLERANCE * abs(value):
                yield f"{case}: {name} was {value:.4g}, is {current:.4g}"


def load() -> Counters:
    """The accepted figures."""
    accepted: Counters = json.loads(FILE.read_bytes())
    return accepted


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what got worse, or accept the present figures."""
    parser = argparse.ArgumentParser(description="Deterministic counters against accepted ones.")
    parser.add_argument("--write", action="store_true", help=f"accept the present figures into {FILE.name}")
    options = parser.parse_args(arguments)
    now = counters()
    if options.write:
        FILE.parent.mkdir(exist_ok=True)
        write_atomically(FILE, (json.dumps(now, indent=2) + "\n").encode())
        return
    print("\n".join(compare(load(), now)) or "nothing got worse")


if __name__ == "__main__":
    main()
