"""A whole run on real servers: every token trained once and in time, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Launch, check_trained, left_running, make_inputs, topology, write_topology
from server_under_test import PYTHON

STEPS = 5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pause_mode", ["in_place", "retract"])
def test_a_run_on_real_servers(tmp_path: Path, pause_mode: str) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    values = topology(inputs, tmp_path, schedule__steps=STEPS, schedule__pause_mode=pause_mode)
    for side in ("student", "teacher"):
        values["engines"][side] |= {
            "kind": "sglang",
            "python": str(PYTHON),
            "api_key": "user",
            "admin_api_key": "admin",
        }
    values["supervisor"] |= {"start_deadline_s": 400.0}
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        assert run.wait(550.0) == 0, run.text()
    folder = tmp_path / "run"
    check_trained(folder, 1, STEPS)
    report = json.loads((folder / "report.json").read_text())
    assert report["staleness"]["max"] <= 1
    assert report["restarts"] == {} and report["counters"].get("engine_errors", 0) == 0
    assert report["cuts"] > 0  # the weights changed in mid-response
    assert left_running(tmp_path) == []
