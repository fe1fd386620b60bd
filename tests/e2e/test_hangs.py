"""What hangs is treated as dead, and what a stranger does to an engine is undone: the run goes on, nothing is lost."""

from __future__ import annotations

import json
import signal
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience
from harness import Launch, check_trained, left_running, steps, topology, write_topology

STEPS = 1000
"""More than pass until everything was done to the run."""
HUNG = (
    {"student-engine-0": ("actors.engine.server", "student"), "teacher-engine-0": ("actors.engine.server", "teacher")},
    {"learner-0": ("learner.main",), "rollout-0": ("actors.rollout",)},
)
"""Who stands still at the same time."""
KEY = "a-key-of-this-test"


def post(engine: str, route: str, **body: Any) -> None:
    """What a stranger who knows the key asks of an engine."""
    request = urllib.request.Request(
        f"{engine}{route}",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=patience(30)) as answer:
        assert answer.status == 200


@pytest.mark.long
def test_what_hangs_is_replaced_and_what_was_changed_is_put_right(inputs: Path, tmp_path: Path) -> None:
    values = topology(inputs, tmp_path, schedule__steps=STEPS, checkpoint__every_steps=2, rollout__resend_after_s=2.0)
    # short, for the time that the test takes: a role that is killed because the machine is slow is no fault here
    values["supervisor"] |= {"heartbeat_deadline_s": patience(1), "restarts": 50}
    for side in ("student", "teacher"):
        values["engines"][side] |= {"api_key": KEY, "admin_api_key": KEY}
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        folder = tmp_path / "run"

        def goes_on() -> None:
            run.wait_for_steps(folder, len(steps(folder)) + 1)

        run.wait_for_steps(folder, 2)
        for together in HUNG:
            for words in together.values():
                run.find(*words).send_signal(signal.SIGSTOP)
            for role in together:
                run.wait_for_text(f"{role} hangs")
                run.wait_for_text(f"{role} ended (killed by SIGKILL)")
            goes_on()
            goes_on()
        plan = json.loads((folder / "plan.json").read_text())
        student = plan["student_engines"][0]
        # again and again: an update that comes at once puts it right before anybody sees it
        relabel = partial(post, student, "/update_weight_version", new_version="by-hand")
        run.wait_for_text("names weights 'by-hand' where the learner sent", again=relabel)
        goes_on()
        post(plan["teacher_urls"]["teacher"][0], "/pause_generation", mode="retract")
        run.wait_for_text("teacher-engine-0 was paused by somebody: it goes on")
        goes_on()
        post(plan["teacher_urls"]["teacher"][0], "/update_weight_version", new_version="by-hand")
        run.wait_for_text("teacher-engine-0 names weights 'by-hand'")
        run.wait_for_text("suspect tokens since its last good canary")
        goes_on()
        run.stop()
    check_trained(folder, 1, len(steps(folder)))
    report = json.loads((folder / "report.json").read_text())
    assert {role for together in HUNG for role in together} <= set(report["restarts"]), run.text()
    (suspect,) = report["suspect"]
    assert 0 < suspect["trained_tokens"] <= suspect["tokens"] and suspect["samples"] and suspect["steps"], suspect
    assert left_running(tmp_path, inputs) == []
