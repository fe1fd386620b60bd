"""A whole run with the examples of docs/hooks.md, in a folder that also has folders named as the project's are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from harness import ROOT, left_running, steps

from opd_async.run.trained import read_trained

sys.path.append(str(ROOT / "tests/core"))
from hook_examples import write_examples

PATIENCE_S = 500.0
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
    opd(tmp_path, "example", "quickstart")
    opd(tmp_path, "run", *[word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")])
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
    going_on = {**SETTINGS, "schedule.steps": 3}
    opd(tmp_path, "run", "--resume", *[word for key, value in going_on.items() for word in ("--set", f"{key}={value}")])
    assert [row["step"] for row in steps(folder)] == [1, 2, 3], "the iterator was advanced to where it stopped"
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
