"""Responses that last many steps: cuts happen, every token is scored and trained once, none older than the bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deadlines import patience
from harness import Launch, check_trained, make_inputs, steps, topology, write_topology

STEPS = 8
BUDGET = 128
LAYERS = 8
"""Of the student: a response takes its engine several times as long as a step takes the learner."""


@pytest.fixture(scope="module")
def slow_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("slow"), LAYERS)


# the default, one step and `deadline`, is that of most other runs here
@pytest.mark.parametrize(
    ("max_staleness", "rule"),
    [
        pytest.param(0, "filled", marks=pytest.mark.long),
        (1, "filled"),
        pytest.param(2, "deadline", marks=pytest.mark.long),
    ],
)
def test_tokens_are_trained_once_and_in_time(slow_inputs: Path, tmp_path: Path, max_staleness: int, rule: str) -> None:
    file = write_topology(
        topology(
            slow_inputs,
            tmp_path,
            schedule__max_staleness=max_staleness,
            schedule__rule=rule,
            schedule__steps=STEPS,
            schedule__tokens_per_step=BUDGET,
            rollout__resend_after_s=patience(5.0),  # what comes twice is scored twice
        ),
        tmp_path / "run.yaml",
    )
    with Launch(file) as run:
        assert run.wait() == 0, run.text()
    folder = tmp_path / "run"
    ranges = check_trained(folder, max_staleness, STEPS)
    report = json.loads((folder / "report.json").read_text())
    assert report["staleness"]["max"] <= max_staleness
    assert report["restarts"] == {} and report["counters"].get("engine_errors", 0) == 0
    # deadlines cut responses, and the weights changed in mid-response
    assert report["cuts"] > 0
    assert any(len(parts) > 1 and parts[0][2] < parts[-1][3] for parts in ranges.values())
    assert report["trained_tokens"] == sum(end - start for parts in ranges.values() for start, end, *_ in parts)
    assert all(row["tokens"] >= BUDGET for row in steps(folder))
    # each request computes its new tokens and the one before them; a chunk is at least one event of 4 tokens
    assert report["teacher_recompute"] <= 1 + 1 / 4 + 3 / 16, report
    assert 0 < report["prefix_hit_share"] < 1
