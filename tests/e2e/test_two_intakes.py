"""Runs with two intakes: what the learner is told is what one intake would tell it, whoever dies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
from deadlines import patience
from harness import Launch, check_trained, left_running, loud_lines, rows, steps, topology, write_topology

STEPS = 3
PER_STEP = 8
SECOND = ("actors.intake", "--index", "1")


def test_the_loss_is_the_mean_over_the_tokens_of_all_shares(inputs: Path, tmp_path: Path) -> None:
    """Of strictly on-policy steps the learner's reverse KL is the mean of log mu - log q over all tokens of the step,
    which the samples show one by one."""
    values = topology(
        *(inputs, tmp_path),
        intake__replicas=2,
        learner__data_parallel=2,
        schedule__steps=STEPS,
        schedule__train_on="samples",
        schedule__samples_per_step=PER_STEP,
        schedule__max_staleness=0,
        telemetry__samples_per_step=PER_STEP,
    )
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        assert run.wait() == 0, run.text()
    folder = tmp_path / "run"
    ranges = check_trained(folder, 0, STEPS)
    assert sorted(ranges) == list(range(STEPS * PER_STEP))
    assert loud_lines(folder) == []
    differences: dict[int, list[float]] = {}
    for row in rows(folder / "samples.jsonl"):
        told = np.subtract(row["student_logprobs"], row["teacher_logprobs"])
        differences.setdefault(row["step"], []).extend(told.tolist())
    for row in steps(folder):
        of_step = differences[row["step"]]
        assert len(of_step) == row["tokens"]
        assert row["learner_reverse_kl"] == pytest.approx(float(np.mean(of_step)), abs=2e-3)
        assert row["segments"] == row["completed"] == PER_STEP
    for folder_of, ending in (("logs", "log"), ("counters", "json")):
        assert {file.stem for file in (folder / folder_of).glob(f"intake-*.{ending}")} == {"intake-0", "intake-1"}


@pytest.mark.long
def test_an_intake_may_die_and_a_rollout_actor_too(inputs: Path, tmp_path: Path) -> None:
    """Filled steps of many parts; a run that was killed goes on with one intake."""
    values = topology(
        *(inputs, tmp_path),
        intake__replicas=2,
        learner__data_parallel=2,
        schedule__steps=1000,
        schedule__rule="filled",
        checkpoint__every_steps=2,
        rollout__resend_after_s=2.0,
    )
    folder, file = tmp_path / "run", tmp_path / "run.yaml"
    with Launch(write_topology(values, file)) as run:
        for role, words in (("rollout-0", ("actors.rollout",)), ("intake-1", SECOND)):
            run.wait_for_steps(folder, len(steps(folder)) + 2)
            run.find(*words).kill()
            run.wait_for_text(f"{role} ended (")
            run.wait_for_steps(folder, len(steps(folder)) + 1)
        run.wait_for_steps(folder, len(steps(folder)) + 1)
        family = run.family()
        run.process.kill()
        psutil.wait_procs(family, timeout=patience(20))
    values["intake"]["replicas"] = 1
    count = len(steps(folder)) + 4
    with Launch(write_topology(values, file), "--resume", "--set", f"schedule.steps={count}") as run:
        assert run.wait() == 0, run.text()
    check_trained(folder, 1, count)
    assert left_running(tmp_path, inputs) == []
