"""The learning bench: every cell is a topology that can be run, and what runs leave behind is read and drawn."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from opd_async.bench.learning.__main__ import at_rate, main
from opd_async.bench.learning.cells import METHODS, PARTS, REGIMES, STALENESS, Cell
from opd_async.bench.learning.inputs import ADDITION, Inputs
from opd_async.bench.learning.plots import draw
from opd_async.bench.learning.runs import Outcome, outcome, settings
from opd_async.bench.learning.tables import grouped, table
from opd_async.checks.validation import validate
from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology

ROOT = ADDITION.parents[1]


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    """Files that are there, and have nothing in them."""
    for name in ("train.jsonl", "held_out.jsonl", "given.jsonl"):
        (tmp_path / name).write_text('{"prompt": "1", "label": "2", "completion": "3", "solution": "3"}\n')
    step = tmp_path / "teacher" / "step-1"
    step.mkdir(parents=True)
    return Inputs(
        train=tmp_path / "train.jsonl",
        held_out=tmp_path / "held_out.jsonl",
        student=ADDITION / "models" / "student",
        teacher=ADDITION / "models" / "teacher",
        given=tmp_path / "given.jsonl",
        teacher_checkpoint=tmp_path / "teacher",
    )


def topology_of(cell: Cell, inputs: Inputs, out: Path) -> Topology:
    arguments = settings(cell, inputs, out)
    overrides = [value for flag, value in pairwise(arguments) if flag == "--set"]
    if "--no-use-opd" in arguments:
        overrides.append("opd.use_opd=false")
    return load_topology(ROOT / REGIMES[cell.regime].topology, overrides)


@pytest.mark.parametrize("part", PARTS)
def test_every_cell_can_be_run(part: str, inputs: Inputs, tmp_path: Path) -> None:
    cells = PARTS[part](1)
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        found = validate(topology_of(cell, inputs, tmp_path))
        # the teacher's checkpoint is made by the command itself
        assert [line for line in found if not line.startswith("opd.teacher_load")] == [], cell.name


def test_all_methods_are_given_the_same_steps_and_responses(inputs: Inputs, tmp_path: Path) -> None:
    found = {cell: topology_of(cell, inputs, tmp_path) for cell in PARTS["methods"](2)}
    assert len({(t.schedule.steps, t.schedule.samples_per_step, t.schedule.train_on) for t in found.values()}) == 1
    assert Counter(topology.seed for topology in found.values()) == {0: len(METHODS), 1: len(METHODS)}
    assert {topology.schedule.max_staleness for topology in found.values()} == {1}
    groups = {cell.method: topology.rollout.group_size for cell, topology in found.items()}
    assert groups["sft"] == groups["kd"] == groups["opd"] == groups["opd_jsd"] == 1
    assert groups["opd_16"] == groups["grpo"] == groups["opd_grpo"] == 8


def a_run(out: Path, cell: Cell, sampled: float) -> Outcome:
    """What the launcher leaves behind, as far as it is read."""
    folder = out / cell.name
    folder.mkdir(parents=True)
    report = {"staleness": {"mean": 0.5, "max": 1}, "trained_tokens": 4096, "seconds": 60.0}
    rows: list[dict[str, object]] = [
        {"evaluation": "student", "step": step, "pass_at_1": share, "pass_at_1_greedy": share + 0.1}
        for step, share in ((0, 0.5), (20, 0.4), (40, sampled))
    ]
    rows += [{"evaluation": "teacher", "step": 0, "pass_at_1": 1.0, "pass_at_1_greedy": 1.0}]
    rows += [{"step": step, "learner_ratio_std": value} for step, value in ((1, 0.1), (2, 0.3), (3, float("nan")))]
    rows += [{"step": step, "tokens": tokens} for step, tokens in ((1, 1024), (20, 1024), (21, 1024), (40, 1024))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "report.json").write_text(json.dumps(report))
    found = outcome(cell, out)
    assert found is not None
    return found


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    cell = Cell(part="methods", regime="short", method="opd", seed=0, lr=2e-3)
    assert outcome(cell, tmp_path) is None
    found = a_run(tmp_path, cell, 0.9)
    assert found.steps == [0, 20, 40] and found.sampled == [0.5, 0.4, 0.9]
    assert found.ratio_std == 0.3 and found.staleness_max == 1
    assert found.lowest == pytest.approx(0.5)  # greedy at step 20


def test_seeds_are_averaged_and_their_range_is_shown(tmp_path: Path) -> None:
    cell = Cell(part="methods", regime="short", method="opd", seed=0, lr=2e-3)
    runs = [
        a_run(tmp_path, dataclasses.replace(cell, seed=seed), sampled) for seed, sampled in enumerate((0.8, 0.9, 0.85))
    ]
    other = a_run(tmp_path, dataclasses.replace(cell, method="sft"), 0.7)
    assert [len(group) for group in grouped([*runs, other]).values()] == [3, 1]
    lines = table("methods", [*runs, other]).splitlines()
    assert len(lines) == 4 and REGIMES["short"].title in lines[0]
    assert " 85.0 (80.0 to 90.0)" in lines[2] and " 70.0 " in lines[3]


def test_rules_are_compared_at_equal_tokens(tmp_path: Path) -> None:
    cells = [cell for cell in PARTS["rules"](1) if cell.method == "topk"]
    runs = [a_run(tmp_path, cell, 0.9) for cell in cells]
    assert runs[0].seen == [0, 2048, 4096]
    assert [runs[0].after(tokens) for tokens in (0, 1024, 3072, 9999)] == pytest.approx([0.5, 0.45, 0.65, 0.9])
    assert runs[0].budgets == pytest.approx(4096 / 40 / (128 * 32))
    lines = table("rules", runs).splitlines()
    assert [(line.split()[2], line.split()[3]) for line in lines[2:]] == [
        *(("deadline", "1"), ("deadline", "2"), ("filled", "1"), ("filled", "2"), ("filled", "-"))
    ]
    assert lines[1].split()[-5:] == ["819", "1,638", "2,458", "3,277", "4,096"]
    assert lines[2].split()[-5:] == ["46.0", "42.0", "50.0", "70.0", "90.0"]


@pytest.mark.parametrize("part", ["methods", "staleness", "rules"])
def test_pictures(part: str, tmp_path: Path) -> None:
    cells = [cell for cell in PARTS[part](2) if part != "staleness" or cell.staleness in STALENESS[:2]]
    draw(tmp_path / "out.png", part, [a_run(tmp_path, cell, 0.9) for cell in cells])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_there_is_printed_and_written_without_running_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for cell in PARTS["rates"](1)[:2]:
        a_run(tmp_path, cell, 0.9)
    file = tmp_path / "rates.json"
    assert main(["--part", "rates", "--limit", "0", "--out", str(tmp_path), "--json", str(file)]) == 0
    missing = len(PARTS["rates"](1)) - 2
    assert f"{missing} of {missing + 2} runs are missing" in capsys.readouterr().out
    assert [run["cell"]["method"] for run in json.loads(file.read_text())["runs"]] == ["sft", "kd"]


def test_another_rate_makes_other_cells_and_none_twice() -> None:
    cells = at_rate(PARTS["rates"](1), 3e-3)
    assert {cell.lr for cell in cells} == {3e-3}
    assert len({cell.name for cell in cells}) == len(cells) == len(METHODS) - 1
    assert at_rate(PARTS["regimes"](1), None) == PARTS["regimes"](1)
