"""Engines that a run did not start: one that restarts by itself has its first weights, and gets the present ones."""

from __future__ import annotations

import json
from pathlib import Path

from harness import Launch, check_trained, steps, topology, write_topology
from lies import embedded_engine

from opd_async.plan.free_ports import free_ports

STEPS = 10


def test_a_student_engine_that_restarts_by_itself_gets_the_present_weights(inputs: Path, tmp_path: Path) -> None:
    (port,) = free_ports("127.0.0.1", 1)
    values = topology(inputs, tmp_path, schedule__steps=STEPS, rollout__resend_after_s=2.0)
    values["engines"]["student"] |= {"kind": "external", "urls": [f"http://127.0.0.1:{port}"]}
    folder = tmp_path / "run"
    with embedded_engine(inputs / "student", port) as url:
        run = Launch(write_topology(values, tmp_path / "run.yaml"))
        run.wait_for_steps(folder, 3)
    with run, embedded_engine(inputs / "student", port):
        before = len(steps(folder))
        run.wait_for_steps(folder, before + 3)
        assert run.wait() == 0, run.text()
        text = run.text()
    check_trained(folder, 1, STEPS)
    # the engine went away between two weight updates, or during one
    found = f"{url} names weights 'default' where the learner sent " in text
    assert found or f"weights were not sent (engine {url} did not answer" in text, text
    report = json.loads((folder / "report.json").read_text())
    assert report["restarts"] == {} and report["counters"]["engine_errors"] > 0, text
