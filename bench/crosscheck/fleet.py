"""Tokens a second by the number of student engines: real roles on simulated devices, beside the virtual clock.

    python -m bench.crosscheck.fleet [--engines 1 2 4 8] [--join] [--scale 0.25] [--steps 12] [--json FILE]

With each number of engines, a run of as many times the slots and responses a step, a teacher and a learner as many
times as fast: throughput that follows the number has the same figure for each engine. What does not grow with them is
one of each: launcher, rollout actor, teacher actor, intake. `--scale` as for `python -m bench.crosscheck`: all
processes share this machine's processors. Engines and learner only sleep, so that few processors do.

`--join` is one run for all numbers, which begins with the first one and is joined by as many hosts as each next one
takes (`joining.py`). Its steps, teacher and learner are those of the last number from the beginning.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd_async.bench.crosscheck import joining
from opd_async.bench.crosscheck.__main__ import Asked, Figures, real, virtual
from opd_async.bench.crosscheck.scenario import Scenario, add_arguments
from opd_async.config.topology import StepRule, TrainOn
from opd_async.files import write_atomically

HEAD = "| engines | tokens/s, virtual clock | tokens/s, real roles | for each engine, relative to the first row |\n"
JOIN_HEAD = "| engines | joined in, s | tokens/s, real roles | for each engine, relative to the first row |\n"


def row(engines: int, found: Figures, predicted: Figures, first: float) -> str:
    """A line of the table; `first` is tokens a second for each engine of the first row."""
    share = found.tokens_per_s / engines / first
    return f"| {engines} | {predicted.tokens_per_s:,.0f} | {found.tokens_per_s:,.0f} | {share:.2f} |"


def join(options: argparse.Namespace, asked: Asked) -> list[joining.Phase]:
    """The run that hosts join, and its table."""
    scenario = Scenario.of(argparse.Namespace(**{**vars(options), "engines": options.engines[-1]}))
    with tempfile.TemporaryDirectory() as folder:
        phases = joining.run(scenario, asked, Path(folder), options.engines)
    first = phases[0].tokens_per_s / phases[0].engines
    print(f"{JOIN_HEAD}|---:|---:|---:|---:|")
    for phase in phases:
        share, took = phase.tokens_per_s / phase.engines / first, f"{phase.joined_s:.0f}" if phase.joined_s else ""
        print(f"| {phase.engines} | {took} | {phase.tokens_per_s:,.0f} | {share:.2f} |")
    return phases


def each(options: argparse.Namespace, asked: Asked) -> dict[int, dict[str, Figures]]:
    """A run with each number of engines, and their table."""
    both: dict[int, dict[str, Figures]] = {}
    for engines in options.engines:
        values = {**vars(options), "engines": engines}
        scenario = Scenario.of(argparse.Namespace(**values))
        with tempfile.TemporaryDirectory() as folder:
            both[engines] = {"real": real(scenario, asked, Path(folder)), "virtual": virtual(scenario, asked)}
    first, figures = next(iter(both.items()))
    print(f"{HEAD}|---:|---:|---:|---:|")
    for engines, found in both.items():
        print(row(engines, found["real"], found["virtual"], figures["real"].tokens_per_s / first))
    return both


def main(arguments: Sequence[str] | None = None) -> None:
    """Run with each number of engines, and print the table."""
    parser = argparse.ArgumentParser(description="Throughput of real roles by the number of simulated engines.")
    add_arguments(parser, several=True)
    parser.set_defaults(scale=0.25, slots=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--join", action="store_true", help="one run for all numbers, in which engines come one by one")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.join and sorted(set(options.engines)) != options.engines:
        parser.error(f"--join: engines only come, so write growing numbers after --engines, not {options.engines}")
    asked = Asked(TrainOn.TOKENS, StepRule.FILLED, 1, options.steps)
    content: Any
    if options.join:
        content = [dataclasses.asdict(phase) for phase in join(options, asked)]
    else:
        found = each(options, asked)
        content = {count: {name: dataclasses.asdict(one) for name, one in of.items()} for count, of in found.items()}
    if options.json is not None:
        write_atomically(options.json, json.dumps(content, indent=2).encode())


if __name__ == "__main__":
    main()
