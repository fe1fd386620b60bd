"""GRPO and PPO on written addition in small, without any teacher: rewards from the response to the learner's step."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from deadlines import patience
from harness import ROOT, Launch, check_trained, steps

SAMPLES, STEPS, CRITIC_ONLY = 64, 5, 2
WAYS = {
    "grpo": {"rollout.group_size": 8},
    "ppo": {"rollout.group_size": 1, "advantage.lam": 0.95, "advantage.critic.only_steps": CRITIC_ONLY},
}


@pytest.mark.parametrize("estimator", WAYS)
def test_rewards_alone_are_learnt_from(tmp_path: Path, estimator: str) -> None:
    make_data = [sys.executable, "examples/addition/make_data.py", "--out", str(tmp_path), "--train", "2000"]
    subprocess.run([*make_data, "--held-out", "50"], cwd=ROOT, check=True, timeout=patience(60))
    changes = {
        "run_dir": tmp_path,
        "data.train.path": tmp_path / "train.jsonl",
        "data.held_out.path": tmp_path / "held_out.jsonl",
        "schedule.steps": STEPS,
        "schedule.train_on": "samples",
        "schedule.samples_per_step": SAMPLES,
        "rollout.slots": 64,
        "reward.kind": "exact_match",
        "advantage.estimator": estimator,
        "learner.optimizer.warmup_steps": 1,
        "learner.optimizer.lr": 3.0e-4,  # that of the quickstart is for a signal on every token
        "evaluation.every_steps": "null",
        "evaluation.prompts": 50,
        "evaluation.samples_per_prompt": 2,
        "evaluation.judge": "reward",
    } | WAYS[estimator]
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    file = tmp_path / "quickstart.yaml"
    file.write_text((ROOT / "examples" / "quickstart.yaml").read_text())
    with Launch(file, "--no-use-opd", *options) as run:
        assert run.wait() == 0, run.text()
    folder = tmp_path / "quickstart"
    logs = {path.stem for path in (folder / "logs").iterdir()}
    assert logs == {"launcher", "student-engine-0", "intake-0", "rollout-0", "learner-0"}
    trained = check_trained(folder, 1, STEPS)
    assert sorted(trained) == list(range(SAMPLES * STEPS)), "every step takes whole groups, in order"
    rows = steps(folder)
    for row in rows:
        assert (row["rewarded"], row["unrewarded"]) == (SAMPLES, 0)
        assert 0.0 < row["reward_mean"] < 1.0 and 0.0 <= row["flat_groups"] <= 1.0
        # nobody teaches: nothing is said of a teacher, nor of what this run has no part for
        absent = {"reverse_kl", "k3", "student_support", "teacher_support", "entropy", "reference_kl"}
        assert not {f"learner_{name}" for name in absent} & set(row)
        assert ("learner_value_loss" in row) is (estimator == "ppo")
    only = CRITIC_ONLY if estimator == "ppo" else 0
    assert ["learner_grad_norm" in row for row in rows] == [False] * only + [True] * (STEPS - only)
    assert all((row.get("learner_critic_grad_norm", 0.0) > 0.0) == (estimator == "ppo") for row in rows)
    if estimator == "ppo":
        # each batch has a mean reward of its own, which moves the loss more than five steps do; the values only rise
        values = [row["learner_value_mean"] for row in rows]
        assert values[0] == 0.0 and all(before < after for before, after in pairwise(values))
        assert all(0.0 < row["learner_value_loss"] <= row["reward_mean"] / 2 for row in rows)
        assert values[-1] < min(row["reward_mean"] for row in rows)
    report = json.loads((folder / "report.json").read_text())
    assert report["teacher"] is None and report["stages"]["teacher"] is None
    for when in ("student_before", "student_after"):
        assert (report[when]["samples_per_prompt"], report[when]["unjudged"]) == (2, 0)
        assert 0.1 < report[when]["pass_at_1"] < 1.0
