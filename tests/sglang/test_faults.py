"""Faults between the actors and two real servers: each kind is noticed, counted and asked again, none is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import SLOTS, Launch, check_trained, make_inputs, topology, write_topology
from lies import liar
from lying_proxy import LIES
from server_under_test import ADMIN_KEY, API_KEY, running

STEPS = 8
pytestmark = pytest.mark.timeout(900)


def test_faults_in_front_of_real_servers(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    told: dict[str, list[str]] = {"student": [], "teacher": []}
    with (
        running(inputs / "student", tmp_path / "student.log") as student_server,
        running(inputs / "teacher", tmp_path / "teacher.log") as teacher_server,
        liar(student_server.url, 4, told["student"]) as student,
        liar(teacher_server.url, 4, told["teacher"], len(LIES) // 2) as teacher,
    ):
        values = topology(
            inputs,
            tmp_path,
            schedule__steps=STEPS,
            rollout__resend_after_s=2.0,
            rollout__request_deadline_s=5.0,
            rollout__request_retries=20,  # one response may meet several lies in a row
            teacher__max_in_flight=2,
            teacher__request_deadline_s=5.0,
        )
        for side, url in (("student", student), ("teacher", teacher)):
            keys = {"api_key": API_KEY, "admin_api_key": ADMIN_KEY}
            values["engines"][side] |= {"kind": "external", "urls": [url]} | keys
        values["supervisor"] |= {"start_deadline_s": 300.0, "heartbeat_deadline_s": 120.0}
        with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
            assert run.wait(500.0) == 0, run.text()
    check_trained(tmp_path / "run", 1, STEPS)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(told["student"]) | set(told["teacher"]) == set(LIES), told
    # all but those that were told while the run was ending: to streams, batches and a canary that it had given up
    assert report["counters"]["engine_errors"] >= max(len(told["student"]) - SLOTS, 3)
    told_to_teacher = report["counters"]["teacher_retries"] + report["counters"].get("canaries_failed", 0)
    assert told_to_teacher >= len(told["teacher"]) - values["teacher"]["max_in_flight"] - 1  # one canary
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(row["learner_reverse_kl"]) < 5 for row in rows)
