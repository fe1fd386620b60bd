"""Engines that a run did not start: one that restarts by itself has its first weights, and gets the present ones."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
from claimed_ports import claimed_port
from harness import Launch, check_trained, steps, topology, write_topology
from lies import embedded_engine

STEPS = 1000
"""More than pass until the engine is back."""


@pytest.mark.long
def test_a_student_engine_that_restarts_by_itself_gets_the_present_weights(inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with claimed_port() as port, ExitStack() as first:
        url = first.enter_context(embedded_engine(inputs / "student", port))
        values = topology(inputs, tmp_path, schedule__steps=STEPS, rollout__resend_after_s=2.0)
        values["engines"]["student"] |= {"kind": "external", "urls": [url]}
        with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
            run.wait_for_steps(folder, 3)
            first.close()
            with embedded_engine(inputs / "student", port):
                run.wait_for_steps(folder, len(steps(folder)) + 3)
                run.stop()
            text = run.text()
    check_trained(folder, 1, len(steps(folder)))
    # the engine went away between two weight updates, or during one
    found = f"{url} names weights 'default' where the learner sent " in text
    assert found or f"weights were not sent (engine {url} did not answer" in text, text
    report = json.loads((folder / "report.json").read_text())
    assert report["restarts"] == {}, text
