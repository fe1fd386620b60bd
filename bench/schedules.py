"""Schedules side by side: the same engines and prompts, one virtual clock each.

    python -m bench.schedules [--preset heavy-tail] [--lengths 2000,16000,16384] [--json FILE] [--plot FILE]

    preset -> Workload -> (schedule x scoring) -> Simulation -> Row -> table, JSON, picture

Nothing is timed: figures depend on preset and seed alone. docs/measurements.md explains the columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opd_async.bench.sim.colocated import Colocated
from opd_async.bench.sim.figures import Row
from opd_async.bench.sim.plots import draw_schedules
from opd_async.bench.sim.presets import PRESETS, TOOLS
from opd_async.bench.sim.rules import (
    Rule,
    Scoring,
    deadline_cuts,
    dropping,
    filled,
    one_step_off,
    partial_rollouts,
    sample_stream,
    sync,
    two_step_off,
    whole_samples,
)
from opd_async.bench.sim.simulation import Simulation
from opd_async.bench.sim.tools import Tools
from opd_async.files import write_atomically
from opd_async.forecast.lengths import parse_lengths
from opd_async.forecast.workload import Workload

POOLS = tuple((switch_s, full) for full in (False, True) for switch_s in (0.0, 5.0, 10.0))
"""Colocated: seconds a step to change the work of the devices, and whether each engine has all the slots of one."""
WARMUP = 10
STEPS = 30


def rules() -> list[Rule]:
    """Every schedule, each peer's with the settings that suit it best."""
    return [
        sync(),
        one_step_off(),
        two_step_off(),
        sample_stream(1),
        sample_stream(1.5),
        sample_stream(2),
        whole_samples(1),
        whole_samples(4),
        partial_rollouts(),
        *(dropping(limit) for limit in (1, 2, 4)),
        *(deadline_cuts(staleness) for staleness in (0, 1, 2, 4)),
        *(filled(staleness) for staleness in (0, 1, 2, 4, None)),
    ]


def measure(
    workload: Workload,
    cases: Sequence[tuple[Rule, Scoring]],
    seed: int,
    steps: int,
    warmup: int,
    tools: Tools | None = None,
) -> Iterator[Row]:
    """A row for every schedule and way of scoring: figures of `steps` steps behind the first `warmup`."""
    for rule, scoring in cases:
        yield Simulation(workload, rule, scoring, seed, tools).run(warmup, steps)


def describe(workload: Workload, tools: Tools | None = None) -> str:
    """What binds this workload."""
    if tools is not None:
        slots = "free" if tools.frees_slot else "held"
        return (
            f"{describe(workload)}; turns of {tools.turn_tokens:,.0f} tokens, between them tools of "
            f"{tools.shortest_s:g} to {tools.longest_s:g} s (mean {tools.mean_s:.1f}), slots {slots} meanwhile"
        )
    rates = workload.rates()
    return (
        f"{workload.slots} slots on {workload.engines} engines, steps of {workload.tokens_per_step:,} tokens "
        f"({workload.samples_per_step} responses of {workload.mean_tokens:,.0f} on average); tokens/s: "
        f"rollout {rates.rollout:,.0f}, teacher {rates.teacher:,.0f}, learner {rates.learner:,.0f}"
    )


HEADER = (
    f"{'schedule':<14} {'scoring':<9}{'S':>2} {'share':>6} {'tokens/s':>9} {'age mean':>9}{'p99':>4}{'max':>4} "
    f"{'in budgets':>10}{'max':>6} {'score p50':>10}{'p99 s':>8} {'recompute t':>12}{'l':>6} "
    f"{'idle r':>7}{'t':>6}{'l':>6} {'bubble':>7} {'blocked s':>9} {'step':>5}{'sd':>5}{'max':>5} "
    f"{'lost':>5}{'length':>7}"
)


def line(row: Row) -> str:
    """One line of the table."""
    idle, bound = row.idle, "-" if row.max_staleness is None else row.max_staleness
    cells = (
        f"{row.schedule:<14} {row.scoring:<9}{bound:>2} {row.share_of_bound:>6.2f}",
        f"{row.tokens_per_s:>9,.0f} {row.age_mean:>9.2f}{row.age_p99:>4}{row.age_max:>4}",
        f"{row.age_budgets_mean:>10.2f}{row.age_budgets_max:>6.2f}",
        f"{row.score_p50_s:>10.2f}{row.score_p99_s:>8.2f} {row.teacher_recompute:>12.2f}{row.learner_recompute:>6.2f}",
        f"{idle.rollout:>7.2f}{idle.teacher:>6.2f}{idle.learner:>6.2f} {row.bubble:>7.2f}",
        f"{row.sync_blocked_s:>9.1f} {row.step_tokens:>5.2f}{row.step_tokens_sd:>5.2f}{row.step_tokens_max:>5.2f}",
        f"{row.lost_share:>5.2f}{row.trained_length:>7.2f}",
    )
    return " ".join(cells)


def report(preset: str, workload: Workload, rows: Sequence[Row], settings: dict[str, Any]) -> bytes:
    """The figures as JSON."""
    content = {
        "preset": preset,
        **settings,
        "rates": dataclasses.asdict(workload.rates()),
        "tokens_per_step": workload.tokens_per_step,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    return json.dumps(content, indent=2).encode()


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print the table as it grows, write the figures where asked."""
    parser = argparse.ArgumentParser(description="Schedules side by side on a virtual clock.")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="heavy-tail")
    parser.add_argument("--lengths", help="MEDIAN,P99,CAP, zipf:SHORTEST,EXPONENT,CAP, or a file with a length a line")
    parser.add_argument("--hold-slots", action="store_true", help="what waits for a tool keeps its slot")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps that count")
    parser.add_argument("--warmup", type=int, default=WARMUP, help="steps before them")
    parser.add_argument("--seed", type=int, default=0)
    names = {rule.name for rule in rules()} | {"colocated"}
    parser.add_argument("--only", nargs="+", choices=sorted(names), help="these schedules")
    parser.add_argument("--scoring", nargs="+", type=Scoring, choices=list(Scoring), default=list(Scoring))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="write a picture (PNG) to this file")
    options = parser.parse_args(arguments)
    workload, name = PRESETS[options.preset], options.preset
    if options.lengths is not None:
        workload = dataclasses.replace(workload, lengths=parse_lengths(options.lengths))
        name += f" with lengths {options.lengths}"
    tools = TOOLS.get(options.preset)
    if options.hold_slots:
        if tools is None:
            parser.error(f"--hold-slots: {options.preset} has no tools; choose {', '.join(TOOLS)}")
        tools = dataclasses.replace(tools, frees_slot=False)
    print(f"{name}: {describe(workload, tools)}\n{HEADER}", flush=True)
    rows = []
    wanted = [rule for rule in rules() if rule.name in (options.only or {rule.name})]
    cases = [(rule, scoring) for rule in wanted for scoring in options.scoring]
    for row in measure(workload, cases, options.seed, options.steps, options.warmup, tools):
        print(line(row), flush=True)
        rows.append(row)
    for switch_s, full in POOLS if "colocated" in (options.only or {"colocated"}) else ():
        rows.append(Colocated(workload, switch_s, full, options.seed, tools).run(options.warmup, options.steps))
        print(line(rows[-1]), flush=True)
    if options.json is not None:
        settings = {
            "lengths": options.lengths,
            "hold_slots": options.hold_slots,
            "seed": options.seed,
            "warmup": options.warmup,
        }
        write_atomically(options.json, report(options.preset, workload, rows, settings))
    if options.plot is not None:
        draw_schedules(options.plot, rows, name)


if __name__ == "__main__":
    main()
