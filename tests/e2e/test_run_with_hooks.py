"""A whole run with the examples of docs/hooks.md and a tracker; its folder also has folders named as the project's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from deadlines import patience
from harness import ROOT, left_running, steps

from opd_async.run.trained import read_trained

sys.path.append(str(ROOT / "tests/core"))
from hook_examples import write_examples
from stand_in_tracker import told, write_python

PATIENCE_S = patience(90.0)
SETTINGS = {
    "schedule.steps": 2,
    "schedule.train_on": "samples",
    "schedule.samples_per_step": 32,
    "rollout.slots": 64,
    "rollout.group_size": 4,
    "data.train": "null",
    "data.function": "my_hooks:curriculum",
    "reward.kind": "python",
    "reward.function": "my_hooks:judge",
    "advantage.estimator": "grpo",
    "opd.loss": "reverse_kl",
    "opd.function": "my_loss:loss",
    "schedule.filter": "my_hooks:keep",
    "tracking.function": "my_hooks:track",
    "tracking.trackers": "[wandb]",
    "tracking.offline": "true",
    "tracking.python": "tracker/python",
    "evaluation.prompts": 8,
    "evaluation.every_steps": "null",
    "evaluation.teacher": "false",
}


def opd(folder: Path, *words: str, code: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "opd_async.cli", *words]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=PATIENCE_S, check=False
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_every_hook_of_the_page_in_one_run(tmp_path: Path) -> None:
    for name in ("learner", "actors", "torch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('a folder of the user')")
    write_examples(tmp_path)
    (tmp_path / "tracker").mkdir()
    write_python(tmp_path / "tracker")
    opd(tmp_path, "example", "quickstart")
    said = opd(tmp_path, "run", *[word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")])
    folder = tmp_path / "runs/quickstart"
    taken = steps(folder)
    assert [row["step"] for row in taken] == [1, 2]
    for row, log in zip(taken, read_trained(folder), strict=True):
        assert row["filtered"] % 4 == 0 and len(log.ranges) == 32 - row["filtered"]
    assert sum(row["filtered"] for row in taken) < 64
    tracked = [json.loads(line) for line in (tmp_path / "tracked.jsonl").read_text().splitlines()]
    assert [row["step"] for row in tracked if row["kind"] == "step"] == [1, 2]
    assert [row["evaluation"] for row in tracked if row["kind"] == "evaluation"] == ["student", "student"]
    kernels = "kernels (learner.kernels: auto): attention by torch, norms and gates by torch"
    assert kernels in (folder / "logs/learner-0.log").read_text()
    assert any("starting 6 processes" in row["event"] for row in tracked if row["kind"] == "event")
    begun, report = told(folder)[0]["init"], told(folder)[-1]
    assert begun["config"]["schedule"]["steps"] == 2 and begun["name"] == "quickstart" and begun["mode"] == "offline"
    assert report["finish"] == 0 and report["report"]["steps"] == 2
    going_on = {**SETTINGS, "schedule.steps": 3}
    said += opd(
        tmp_path, "run", "--resume", *[word for key, value in going_on.items() for word in ("--set", f"{key}={value}")]
    )
    rows = steps(folder)
    assert [row["step"] for row in rows] == [1, 2, 3], "the iterator was advanced to where it stopped"
    tracker = told(folder)
    assert [row["init"]["id"] for row in tracker if "init" in row] == [None, "first"], "one run of the tracker"
    figures = [(row["step"], row["train/learner_loss"]) for row in tracker if "train/learner_loss" in row]
    assert figures == [(row["step"], row["learner_loss"]) for row in rows]
    assert [row["step"] for row in tracker if any(name.startswith("evaluation/student/") for name in row)] == [0, 2, 3]
    assert sum(len(row["samples"]["data"]) for row in tracker if "samples" in row) >= 3 * 4
    assert "warning: tracker" not in said
    assert left_running(tmp_path) == []


def test_a_hook_that_raises_ends_the_run_at_once_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "my_loss.py").write_text("def loss(rows):\n    raise ValueError('no teacher today')\n")
    opd(tmp_path, "example", "quickstart")
    changes = {"schedule.steps": 2, "opd.loss": "reverse_kl", "opd.function": "my_loss:loss", "evaluation.prompts": 8}
    changes |= {"evaluation.every_steps": "null", "evaluation.teacher": "false"}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    said = opd(tmp_path, "run", *words, code=2)
    assert re.search(r"opd.function: my_loss:loss raised ValueError: no teacher today for samples? \d+", said)
    assert "learner-0 ended (exit code 2) and would again" in said and "restarting" not in said
    log = (tmp_path / "runs/quickstart/logs/learner-0.log").read_text()
    for text in (said, log):
        assert not re.search(
            r"torch\.distributed|elastic|Traceback|Root Cause", text.replace("elastic_error_file", "")
        ), text
    assert left_running(tmp_path) == []
