"""The forecast of `--plan` agrees with the simulation of the real state machines."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from opd_async.bench import forecasts
from opd_async.bench.sim.presets import balanced, real
from opd_async.bench.sim.rules import Scoring, deadline_cuts, filled
from opd_async.bench.sim.simulation import Simulation
from opd_async.config.topology import StepRule
from opd_async.forecast.cost_model import QWEN3_8B, QWEN3_30B_A3B
from opd_async.forecast.devices import H200, NETWORK_400G
from opd_async.forecast.steps import forecast
from opd_async.forecast.workload import Devices

WITHIN = 0.08


WORKLOADS = {
    "balanced": balanced(slots=64),
    "fast learner": balanced(slots=64, learner=2.0),
    "8B on H200": dataclasses.replace(
        real(QWEN3_8B, QWEN3_30B_A3B, H200, NETWORK_400G, Devices(2, 1, 1), 1), cache_tokens=1 << 20
    ),
    "forgetful": dataclasses.replace(balanced(slots=64, teacher=1.5), cache_tokens=150_000),
}


DEADLINE, FILLED = StepRule.DEADLINE, StepRule.FILLED


@pytest.mark.parametrize(
    ("name", "rule", "staleness"),
    [
        ("balanced", DEADLINE, 1),
        ("balanced", DEADLINE, 2),
        ("balanced", DEADLINE, 4),
        ("fast learner", DEADLINE, 1),
        ("8B on H200", DEADLINE, 1),
        ("8B on H200", DEADLINE, 2),
        ("forgetful", DEADLINE, 1),
        ("forgetful", DEADLINE, 2),
        ("balanced", FILLED, 0),
        ("fast learner", FILLED, 0),
        ("8B on H200", FILLED, 0),
        ("balanced", FILLED, 1),
        ("balanced", FILLED, 2),
        ("balanced", FILLED, 4),
        ("balanced", FILLED, None),
        ("fast learner", FILLED, 1),
        ("8B on H200", FILLED, 1),
        ("forgetful", FILLED, 1),
        ("forgetful", FILLED, 2),
    ],
)
def test_a_step_takes_as_long_as_in_the_simulation(name: str, rule: StepRule, staleness: int | None) -> None:
    workload = WORKLOADS[name]
    simulated = filled(staleness) if rule is FILLED else deadline_cuts(staleness or 0)
    row = Simulation(workload, simulated, Scoring.STREAMED).run(warmup=6, steps=14)
    predicted = forecast(workload, staleness, rule)
    assert predicted.seconds == pytest.approx(workload.tokens_per_step / row.tokens_per_s, rel=WITHIN)
    assert predicted.teacher_recompute == pytest.approx(row.teacher_recompute, rel=0.15)
    # a response that is cut again and again is forwarded again and again
    assert predicted.learner_recompute == pytest.approx(row.learner_recompute, rel=0.12)


def test_the_presets_are_compared_and_the_largest_deviation_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(forecasts.PRESETS, "heavy-tail", balanced(slots=16))
    monkeypatch.setattr(forecasts, "CASES", ((DEADLINE, 4), (FILLED, None)))
    file = tmp_path / "figures.json"
    forecasts.main(["--presets", "heavy-tail", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [(row["rule"], row["max_staleness"]) for row in rows] == [("deadline", 4), ("filled", None)]
    for row in rows:
        assert row["deviation"] == pytest.approx(row["forecast_s"] / row["simulated_s"] - 1)
    largest = max(abs(row["deviation"]) for row in rows)
    assert f"largest deviation: {largest:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize("staleness", [0, None])
def test_deadline_cuts_are_forecast_with_a_bound_above_zero(staleness: int | None) -> None:
    with pytest.raises(ValueError, match="a max_staleness of at least 1"):
        forecast(WORKLOADS["balanced"], staleness, DEADLINE)
