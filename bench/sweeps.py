"""How schedules depend on one setting at a time, around the balanced workload of 128 slots.

python -m bench.sweeps [--only tail ratio ...] [--json FILE] [--plot FILE]

setting -> Workload for each value -> Simulation of each schedule -> (value, figure) -> table, JSON, picture
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from opd_async.bench.sim.plots import draw_sweep
from opd_async.bench.sim.presets import balanced
from opd_async.bench.sim.rules import Rule, Scoring, deadline_cuts, one_step_off, sample_stream, whole_samples
from opd_async.bench.sim.simulation import Simulation
from opd_async.files import write_atomically
from opd_async.forecast.lengths import LogNormal
from opd_async.forecast.workload import Devices, Workload

SLOTS = 128
WARMUP, STEPS = 6, 12
DEVICES = 48
"""Of the sweep over splits: 16 for each role are balanced without recompute."""
CUTS = (deadline_cuts(1), deadline_cuts(2), deadline_cuts(4))
OTHERS = (one_step_off(), sample_stream(1))

Curves = dict[str, list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """One setting: its values, what each makes of the workload, the schedules, and the figure that is read off."""

    title: str
    values: tuple[float, ...]
    workload: Callable[[float], Workload]
    rules: tuple[Rule, ...]
    figure: str = "share_of_bound"
    ages: bool = False
    """The setting is the staleness of the schedules themselves."""

    def rule(self, rule: Rule, value: float) -> Rule:
        """One of `rules` at one of `values`."""
        return dataclasses.replace(rule, staleness=int(value)) if self.ages else rule

    def label(self, rule: Rule) -> str:
        """What the rule's curve is called."""
        return rule.name if self.ages else f"{rule.name}, S = {rule.staleness}"


def _split(learner: float) -> Workload:
    """`learner` of the devices for the learner, the rest dealt out evenly."""
    other = (DEVICES - learner) / 2
    base, third = balanced(slots=SLOTS), DEVICES / 3
    slower, train = third / other, third / learner
    return dataclasses.replace(
        base,
        decode=dataclasses.replace(
            base.decode, floor_s=base.decode.floor_s * slower, request_s=base.decode.request_s * slower
        ),
        score=dataclasses.replace(base.score, floor_s=base.score.floor_s * slower, token_s=base.score.token_s * slower),
        train=dataclasses.replace(base.train, token_s=base.train.token_s * train),
        devices=Devices(round(other), round(other), round(learner)),
    )


def _fleet(engines: float) -> Workload:
    """`engines` student engines of 4 slots, and teachers and a learner that keep up."""
    count = int(engines)
    base = balanced(slots=4)
    tokens = dataclasses.replace(base.train, token_s=base.train.token_s / count)
    teachers = max(1, count // 8)
    score = dataclasses.replace(base.score, token_s=base.score.token_s * teachers / count, floor_s=0.0)
    return dataclasses.replace(
        base,
        engines=count,
        teachers=teachers,
        slots=4 * count,
        samples_per_step=4 * count,
        chunk_tokens=2048,
        batch_tokens=16384,
        score=score,
        train=tokens,
    )


SWEEPS: Mapping[str, Sweep] = {
    "tail": Sweep(
        title="99th percentile of lengths",
        values=(4000, 8000, 16000, 32000),
        workload=lambda p99: balanced(LogNormal(2000, int(p99), 2 * int(p99)), slots=SLOTS),
        rules=(*OTHERS, *CUTS),
    ),
    "staleness": Sweep(
        title="S, steps",
        values=(0, 1, 2, 4, 8),
        workload=lambda _: balanced(slots=SLOTS),
        rules=(sample_stream(0), whole_samples(0), deadline_cuts(0)),
        ages=True,
    ),
    "ratio": Sweep(
        title="responses a step / slots",
        values=(1, 2, 4, 8),
        workload=lambda ratio: balanced(ratio=ratio, slots=SLOTS),
        rules=(*OTHERS, *CUTS),
    ),
    "learner": Sweep(
        title="speed of the learner",
        values=(0.5, 1, 1.25, 1.5, 2),
        workload=lambda speed: balanced(learner=speed, slots=SLOTS),
        rules=(*OTHERS, *CUTS),
    ),
    "split": Sweep(
        title=f"learner devices of {DEVICES}",
        values=(14, 16, 17, 18, 19, 20),
        workload=_split,
        rules=CUTS,
        figure="tokens_per_s",
    ),
    "cache": Sweep(
        title="teacher cache, tokens for each slot",
        values=(1000, 2000, 4000, 8000, 16000),
        workload=lambda tokens: dataclasses.replace(
            balanced(slots=SLOTS, teacher=2.0), cache_tokens=int(tokens * SLOTS)
        ),
        rules=(deadline_cuts(1), deadline_cuts(4), whole_samples(4)),
        figure="teacher_recompute",
    ),
    "chunk": Sweep(
        title="chunk, tokens",
        values=(64, 128, 256, 512, 1024, 2048, 4096),
        workload=lambda tokens: dataclasses.replace(balanced(slots=SLOTS), chunk_tokens=int(tokens)),
        rules=(sample_stream(1), *CUTS),
        figure="score_p99_s",
    ),
    "engines": Sweep(
        title="student engines",
        values=(8, 32, 128, 512, 1024),
        workload=_fleet,
        rules=(one_step_off(), deadline_cuts(1)),
    ),
}


def measure(sweep: Sweep) -> Curves:
    """The curve of every schedule."""
    curves: Curves = {}
    for rule in sweep.rules:
        name = sweep.label(rule)
        for value in sweep.values:
            row = Simulation(sweep.workload(value), sweep.rule(rule, value), Scoring.STREAMED).run(WARMUP, STEPS)
            curves.setdefault(name, []).append((value, getattr(row, sweep.figure)))
        print(f"  {name:<22}" + "".join(f"{figure:>12,.3f}" for _, figure in curves[name]), flush=True)
    return curves


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(description="Schedules against one setting at a time.")
    parser.add_argument("--only", nargs="+", choices=sorted(SWEEPS), default=list(SWEEPS), help="some of the sweeps")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="write a picture (PNG) to this file")
    options = parser.parse_args(arguments)
    found: dict[str, Curves] = {}
    for name in options.only:
        sweep = SWEEPS[name]
        title = f"{sweep.figure} against {sweep.title}"
        print(f"{name}: {title}\n  {'':<22}" + "".join(f"{value:>12,g}" for value in sweep.values), flush=True)
        found[title] = measure(sweep)
    if options.json is not None:
        write_atomically(options.json, json.dumps(found, indent=2).encode())
    if options.plot is not None:
        draw_sweep(options.plot, found, f"Balanced stages, {SLOTS} slots, heavy tail; streamed scoring")


if __name__ == "__main__":
    main()
