"""The forecast of `--plan` against the simulation, over the presets.

python -m bench.forecasts [--presets heavy-tail ...] [--json FILE]

preset x (rule, max_staleness) -> Simulation (seconds to compute each) and forecast -> step times and their ratio
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from opd_async.bench.sim.presets import PRESETS
from opd_async.bench.sim.rules import Scoring, deadline_cuts, filled
from opd_async.bench.sim.simulation import Simulation
from opd_async.config.topology import StepRule
from opd_async.files import write_atomically
from opd_async.forecast.steps import forecast
from opd_async.forecast.workload import Workload

CASES: tuple[tuple[StepRule, int | None], ...] = (
    *((StepRule.DEADLINE, staleness) for staleness in (1, 2, 4)),
    *((StepRule.FILLED, staleness) for staleness in (0, 1, 2, 4, None)),
)
WARMUP, STEPS = 8, 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Seconds for each `tokens_per_step` trained tokens, and what was computed for each token that had to be."""

    preset: str
    rule: str
    max_staleness: int | None
    simulated_s: float
    forecast_s: float
    simulated_teacher_recompute: float
    forecast_teacher_recompute: float
    simulated_learner_recompute: float
    forecast_learner_recompute: float

    @property
    def deviation(self) -> float:
        """Of the forecast's step time, relative to the simulated one."""
        return self.forecast_s / self.simulated_s - 1


def compare(preset: str, workload: Workload) -> Iterator[Comparison]:
    """The workload at every bound on the age."""
    for rule, staleness in CASES:
        simulated = filled(staleness) if rule is StepRule.FILLED else deadline_cuts(staleness or 0)
        row = Simulation(workload, simulated, Scoring.STREAMED).run(WARMUP, STEPS)
        predicted = forecast(workload, staleness, rule)
        yield Comparison(
            preset=preset,
            rule=rule.value,
            max_staleness=staleness,
            simulated_s=workload.tokens_per_step / row.tokens_per_s,
            forecast_s=predicted.seconds,
            simulated_teacher_recompute=row.teacher_recompute,
            forecast_teacher_recompute=predicted.teacher_recompute,
            simulated_learner_recompute=row.learner_recompute,
            forecast_learner_recompute=predicted.learner_recompute,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print, and write the figures where asked."""
    parser = argparse.ArgumentParser(description="The forecast of `--plan` against the simulation.")
    parser.add_argument("--presets", nargs="+", choices=sorted(PRESETS), default=list(PRESETS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    print(f"{'preset':<24}{'rule':<9}{'S':>2}{'simulated s':>13}{'forecast s':>12}{'deviation':>11}", end="")
    print(f"{'teacher':>14}{'learner':>14}")
    found: list[Comparison] = []
    for preset in options.presets:
        for one in compare(preset, PRESETS[preset]):
            found.append(one)
            teacher = f"{one.simulated_teacher_recompute:.2f}, {one.forecast_teacher_recompute:.2f}"
            learner = f"{one.simulated_learner_recompute:.2f}, {one.forecast_learner_recompute:.2f}"
            times = f"{one.simulated_s:>13.2f}{one.forecast_s:>12.2f}{one.deviation:>+11.1%}"
            bound = "-" if one.max_staleness is None else one.max_staleness
            print(f"{preset:<24}{one.rule:<9}{bound:>2}{times}{teacher:>14}{learner:>14}", flush=True)
    print(f"largest deviation: {max(abs(one.deviation) for one in found):.1%}")
    if options.json is not None:
        rows = [dataclasses.asdict(one) | {"deviation": one.deviation} for one in found]
        write_atomically(options.json, json.dumps(rows, indent=2).encode())


if __name__ == "__main__":
    main()
