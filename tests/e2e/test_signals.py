"""Ctrl-C: the step under way is finished and saved, every process ends, and the run can go on."""

from __future__ import annotations

import signal
from pathlib import Path

from harness import Launch, check_trained, left_running, steps, topology, write_topology


def test_interrupt_saves_and_resume_goes_on(inputs: Path, tmp_path: Path) -> None:
    file = write_topology(topology(inputs, tmp_path, schedule__steps=1000), tmp_path / "run.yaml")
    folder = tmp_path / "run"
    with Launch(file) as run:
        run.wait_for_steps(folder, 2)
        run.interrupt(signal.SIGTERM)
        assert run.wait() == 130, run.text()
        assert "--resume" in run.text() and "Traceback" not in run.text()
    assert left_running(tmp_path, inputs) == []
    saved = sorted((folder / "checkpoints").glob("step_*/complete.json"))[-1]
    step = int(saved.parent.name.removeprefix("step_"))
    check_trained(folder, 1, step)
    assert [row["step"] for row in steps(folder)] == list(range(1, step + 1)), "the last step has its row"
    with Launch(file, "--resume", "--set", f"schedule.steps={step + 2}") as run:
        assert run.wait() == 0, run.text()
    check_trained(folder, 1, step + 2)
    assert left_running(tmp_path, inputs) == []
    rows = {row["step"]: row for row in steps(folder)}
    for row in (rows[1], rows[step + 1]):  # the first after the start, and the first after resuming
        # what was generated first came from the student's own weights, not from the teacher's, older or initial ones
        assert row["learner_staleness_max"] == 0
        assert abs(row["learner_ratio_mean"] - 1.0) < 1e-3 and row["learner_ratio_std"] < 1e-3


def test_a_second_signal_stops_at_once(inputs: Path, tmp_path: Path) -> None:
    file = write_topology(topology(inputs, tmp_path, schedule__steps=1000), tmp_path / "run.yaml")
    with Launch(file) as run:
        run.wait_for_steps(tmp_path / "run", 1)
        run.interrupt()
        run.interrupt()
        assert run.wait(60.0) != 0
    assert left_running(tmp_path, inputs) == []
