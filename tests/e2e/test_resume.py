"""--resume: a run goes on elsewhere, split in other ways; and not with other prompts under the same path."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import (
    ROOT,
    Launch,
    check_trained,
    command,
    environment,
    left_running,
    rows,
    steps,
    topology,
    write_topology,
)


@pytest.mark.long
def test_a_run_goes_on_split_in_other_ways(inputs: Path, tmp_path: Path) -> None:
    file, folder = write_topology(topology(inputs, tmp_path), tmp_path / "run.yaml"), tmp_path / "run"
    # every layout against every other: tests/learner/test_ranks.py
    ways = (
        (),
        (
            "learner.tensor_parallel=2",
            "learner.micro_batch_tokens=512",
            "engines.student.kv_tokens=4096",
            "rollout.slots=4",
            "supervisor.step_deadline_s=900",
        ),
        ("learner.data_parallel=2", "rollout.replicas=2", "engines.student.replicas=2", "learner.recompute=true"),
    )
    for count, changes in enumerate(ways):
        done = 2 + 2 * count
        words = [word for change in (*changes, f"schedule.steps={done}") for word in ("--set", change)]
        with Launch(file, *(["--resume"] if count else []), *words) as run:
            assert run.wait() == 0, run.text()
        check_trained(folder, 1, done)
        rows = {row["step"]: row for row in steps(folder)}
        # the engines sampled from the very weights that the learner, split anew, has loaded
        assert abs(rows[done - 1]["learner_ratio_mean"] - 1.0) < 1e-3 and rows[done - 1]["learner_ratio_std"] < 1e-3
    kept = {name: json.loads((folder / "counters" / f"{name}.json").read_text()) for name in ("launcher", "learner-0")}
    trained = sum(row["tokens"] for row in steps(folder))
    assert kept["launcher"]['["opd_launcher_trained_tokens_total"]'] == trained, f"of {len(ways)} launches"
    assert kept["learner-0"]['["opd_learner_steps_total"]'] == len(steps(folder))
    assert left_running(tmp_path, inputs) == []


def test_a_run_whose_folder_is_lost_goes_on_from_its_uploads(inputs: Path, tmp_path: Path) -> None:
    """With the prompts that it began with: others under their name are refused."""
    values = topology(inputs, tmp_path, schedule__steps=4)
    prompts = tmp_path / "prompts.jsonl"
    values["data"]["train"]["path"] = str(prompts)
    prompts.write_bytes((inputs / "prompts.jsonl").read_bytes())
    values["checkpoint"] = {"every_steps": 2, "keep": 1, "upload": f"file://{tmp_path}/store"}
    file, folder = write_topology(values, tmp_path / "run.yaml"), tmp_path / "run"
    with Launch(file) as run:
        assert run.wait() == 0, run.text()
    check_trained(folder, 1, 4)
    there = tmp_path / "store" / "run"
    assert [path.name for path in (there / "checkpoints").iterdir()] == ["step_00000004"]
    copied, kept = (root / "export" / "model.safetensors" for root in (there, folder))
    assert copied.read_bytes() == kept.read_bytes()
    counted = json.loads((folder / "counters" / "launcher.json").read_text())
    assert counted['["opd_launcher_uploads_total", ["result", "done"]]'] >= 2
    check_refused_with_other_prompts(file, prompts)
    shutil.rmtree(folder)
    with Launch(file, "--resume", "--set", "schedule.steps=6") as run:
        assert run.wait() == 0, run.text()
        assert "step_00000004 is fetched" in run.text()
    check_trained(folder, 1, 6)
    assert left_running(tmp_path, inputs) == []


def check_refused_with_other_prompts(file: Path, prompts: Path) -> None:
    """A run that is at its end is not resumed for further steps on a file that was swapped; the file is put back."""
    first, *rest = prompts.read_text().splitlines()
    changed = json.loads(first) | {"prompt": "t40 t41 t42"}
    prompts.write_text("\n".join([json.dumps(changed), *rest]) + "\n")
    words = command(file, "--resume", "--set", "schedule.steps=6")
    ended = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert (
        f"the run began with other content in these; bring it back, or choose another name:\n  data.train: {prompts}"
        in (ended.stderr)
    )
    prompts.write_text("\n".join([first, *rest]) + "\n")


@pytest.mark.long
def test_evaluations_over_launches(inputs: Path, tmp_path: Path) -> None:
    """The one that a stop came before is made up for, and a finished run that is resumed adds no row."""
    values = topology(inputs, tmp_path, schedule__steps=1000)
    values["data"]["held_out"] = {"path": str(inputs / "prompts.jsonl")}
    values["evaluation"] = {"every_steps": 3, "prompts": 20, "during_prompts": 8}
    file, folder = write_topology(values, tmp_path / "run.yaml"), tmp_path / "run"
    with Launch(file) as run:
        run.wait_for_steps(folder, 3)  # the evaluation after it begins
        run.interrupt()
        assert run.wait() == 130, run.text()
    stopped = len(steps(folder))
    for _ in range(2):
        with Launch(file, "--resume", "--set", f"schedule.steps={stopped + 2}") as run:
            assert run.wait() == 0, run.text()
        found = [(row["evaluation"], row["step"], row["prompts"]) for row in evaluations(folder)]
        during = [step for who, step, prompts in found if (who, prompts) == ("student", 8)]
        assert [step - step % 3 for step in during] == list(range(3, stopped + 2, 3)), "one for each that was due"
        others = [row for row in found if row[2] != 8]
        assert sorted(others) == [("student", 0, 20), ("student", stopped + 2, 20), ("teacher", 0, 20)]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert (report["steps"], report["this_launch"]["steps"]) == (stopped + 2, 0)
    assert report["student_after"]["step"] == stopped + 2
    assert report["seconds"] == pytest.approx(sum(row["seconds"] for row in steps(folder)))
    assert f"run, the whole run: {stopped + 2} steps in" in run.text() and "this launch: no step" in run.text()


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder / "metrics.jsonl") if "evaluation" in row]
