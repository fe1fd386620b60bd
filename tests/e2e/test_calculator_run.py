"""The calculator example in small: models of a few training steps, a run of a few steps, and what it was given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from deadlines import patience
from harness import ROOT, Launch, check_trained, left_running, rows, steps

EXAMPLE = ROOT / "examples" / "calculator"
STEPS = 3


def make_pair(folder: Path) -> None:
    """The example's data, and models that know how a call looks and little more."""
    code = (
        "import dataclasses, sys, make_pair as made\n"
        "made.STUDENT, made.TEACHER = (dataclasses.replace(one, steps=90, band=(0.0, 1.0)) "
        "for one in (made.STUDENT, made.TEACHER))\n"
        "sys.exit(made.main(sys.argv[1:]))"
    )
    subprocess.run([sys.executable, "-c", code, "--out", str(folder)], cwd=EXAMPLE, check=True, timeout=patience(120))


@pytest.mark.long
def test_the_calculators_answers_are_given_and_never_trained(tmp_path: Path) -> None:
    from examples.calculator.episode import calculate

    data = tmp_path / "data"
    make_pair(data)
    changes = {
        "run_dir": tmp_path,
        "models.student.path": data / "student",
        "models.teacher.path": data / "teacher",
        "data.train.path": data / "train.jsonl",
        "data.held_out.path": data / "held_out.jsonl",
        "schedule.steps": STEPS,
        "schedule.tokens_per_step": 1024,
        "learner.optimizer.warmup_steps": 1,
        "checkpoint.export_hf": False,
        "evaluation.every_steps": 2,
        "evaluation.prompts": 40,
        "evaluation.during_prompts": 8,
        "telemetry.samples_per_step": 64,
    }
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    file = tmp_path / "calculator.yaml"
    file.write_text((EXAMPLE / "calculator.yaml").read_text())
    with Launch(file, *options) as run:
        assert run.wait() == 0, run.text()
    folder = tmp_path / "calculator"
    check_trained(folder, 1, STEPS)
    assert sum(row.get("given_tokens", 0) for row in steps(folder)) > 0
    shown = [row for row in rows(folder / "samples.jsonl") if row.get("given")]
    assert len(shown) > 3
    for row in shown:
        text = row["response"]
        for start, end in row["given"]:
            first, last = row["ends"][start - 1], row["ends"][end - 1]
            # a record names the tokens that are no text, which the episode does not see
            call = re.sub("<[a-z]+>", "", text[text.rindex("[", 0, first) : first])
            assert text[first:last] == calculate(call) and end - start == 4, row
    report = json.loads((folder / "report.json").read_text())
    assert report["counters"].get("episodes_failed", 0) == 0
    assert all(0.0 <= report[side]["pass_at_1"] <= 1.0 for side in ("teacher", "student_before", "student_after"))
    assert left_running(tmp_path) == []
