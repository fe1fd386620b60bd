"""The first run of somebody with two models and a file of prompts: what `opd init` writes runs as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from deadlines import patience
from harness import Launch, check_trained, environment, steps


def test_what_init_writes_runs_at_once(inputs: Path, tmp_path: Path) -> None:
    """With every size chosen by itself, on rows without labels."""
    rows = (json.loads(line) for line in (inputs / "prompts.jsonl").read_text().splitlines())
    prompts = tmp_path / "questions.jsonl"
    prompts.write_text("".join(json.dumps({"question": row["prompt"]}) + "\n" for row in rows))
    file = tmp_path / "first.yaml"
    words = [str(inputs / "student"), str(inputs / "teacher"), str(prompts), "--held-out", str(prompts)]
    words += ["--prompt-key", "question", "--judge", "teacher", "--response", "40", "--steps", "2", "--name", "first"]
    made = subprocess.run(
        [sys.executable, "-m", "opd_async.cli", "init", *words, "--output", str(file)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert made.returncode == 0, made.stderr
    with Launch(file, "--set", f"run_dir={tmp_path}") as run:
        assert run.wait() == 0, run.text()
    folder = tmp_path / "first"
    check_trained(folder, 1, 2)
    assert len(steps(folder)) == 2 and "a response of the student at step 2" in run.text()
    report = json.loads((folder / "report.json").read_text())
    assert report["student_after"]["reverse_kl"] is not None and report["restarts"] == {}
    assert (folder / "samples.html").is_file()
