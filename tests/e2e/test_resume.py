"""--resume: a run goes on elsewhere, split in other ways; and not with other prompts under the same path."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from harness import ROOT, Launch, check_trained, command, environment, left_running, steps, topology, write_topology


def test_a_run_goes_on_split_in_other_ways(inputs: Path, tmp_path: Path) -> None:
    file, folder = (
        write_topology(topology(inputs, tmp_path, schedule__steps=2), tmp_path / "run.yaml"),
        tmp_path / "run",
    )
    with Launch(file) as run:
        assert run.wait() == 0, run.text()
    elsewhere = (
        ("learner.tensor_parallel=2", "learner.micro_batch_tokens=512", "engines.student.kv_tokens=4096"),
        ("learner.pipeline_parallel=2", "rollout.slots=4", "engines.student.replicas=2", "learner.recompute=true"),
        (
            "learner.data_parallel=2",
            "rollout.replicas=2",
            "engines.student.replicas=2",
            "supervisor.step_deadline_s=900",
        ),
    )
    for count, changes in enumerate(elsewhere):
        done = 4 + 2 * count
        words = [word for change in (*changes, f"schedule.steps={done}") for word in ("--set", change)]
        with Launch(file, "--resume", *words) as run:
            assert run.wait() == 0, run.text()
        check_trained(folder, 1, done)
        rows = {row["step"]: row for row in steps(folder)}
        # the engines sampled from the very weights that the learner, split anew, has loaded
        assert abs(rows[done - 1]["learner_ratio_mean"] - 1.0) < 1e-3 and rows[done - 1]["learner_ratio_std"] < 1e-3
    assert left_running(tmp_path, inputs) == []


def test_a_swapped_prompts_file_is_refused(inputs: Path, tmp_path: Path) -> None:
    values = topology(inputs, tmp_path, schedule__steps=1)
    prompts = tmp_path / "prompts.jsonl"
    values["data"]["train"]["path"] = str(prompts)
    prompts.write_bytes((inputs / "prompts.jsonl").read_bytes())
    file = write_topology(values, tmp_path / "run.yaml")
    with Launch(file) as run:
        assert run.wait() == 0, run.text()
    first, *rest = prompts.read_text().splitlines()
    changed = json.loads(first) | {"prompt": "t40 t41 t42"}
    prompts.write_text("\n".join([json.dumps(changed), *rest]) + "\n")
    words = command(file, "--resume", "--set", "schedule.steps=2")
    ended = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert (
        f"the run began with other content in these; bring it back, or choose another name:\n  data.train: {prompts}"
        in (ended.stderr)
    )
