"""Whole runs on real servers: every token trained once and in time, through deaths, with nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Launch, check_trained, left_running, make_inputs, topology, write_topology
from monitoring import Prometheus
from server_under_test import PYTHON

STEPS = 6

pytestmark = pytest.mark.timeout(900)


def on_sglang(inputs: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A topology with a real server on each side, which ask for both keys."""
    values = topology(inputs, tmp_path, schedule__steps=STEPS, **changes)
    for side in ("student", "teacher"):
        values["engines"][side] |= {
            "kind": "sglang",
            "python": str(PYTHON),
            "api_key": "user",
            "admin_api_key": "admin",
        }
    values["supervisor"] |= {"start_deadline_s": 400.0, "heartbeat_deadline_s": 120.0}
    return values


def check_run(run: Launch, folder: Path) -> dict[str, Any]:
    """The run ends well, kept its promises and left nothing behind; returns its report."""
    assert run.wait(800.0) == 0, run.text()
    check_trained(folder, 1, STEPS)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert report["staleness"]["max"] <= 1
    assert report["cuts"] > 0  # the weights changed in mid-response
    assert left_running(folder) == []
    return report


def test_in_place_through_the_death_of_both_servers(tmp_path: Path) -> None:
    values, folder = on_sglang(make_inputs(tmp_path / "inputs"), tmp_path), tmp_path / "run"
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        run.wait_for_steps(folder, 2)
        run.find("sglang.launch_server", "--model-path", "inputs/student").kill()
        run.wait_for_steps(folder, 4)
        run.find("sglang.launch_server", "--model-path", "inputs/teacher").kill()
        report = check_run(run, folder)
    assert report["restarts"] == {"student-engine-0": 1, "teacher-engine-0": 1}


def test_retract_on_two_ranks_with_the_teachers_top_k(tmp_path: Path) -> None:
    """And the dashboard's panels of the servers' own metrics have figures."""
    values = on_sglang(
        make_inputs(tmp_path / "inputs"),
        tmp_path,
        schedule__pause_mode="retract",
        engines__student__tensor_parallel=2,
        opd__loss="jsd_topk",
        opd__topk=8,
    )
    with Prometheus(tmp_path / "prometheus", tmp_path / "run" / "targets.json") as watcher:
        with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
            report = check_run(run, tmp_path / "run")
        assert watcher.empty_in("run", "SGLang") == []
    assert report["restarts"] == {} and report["counters"].get("engine_errors", 0) == 0
