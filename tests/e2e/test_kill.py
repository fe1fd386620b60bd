"""kill -9 of each role while it works: the run goes on to its end, and nothing is trained twice or lost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import psutil
import pytest
from deadlines import patience
from harness import SLOTS, Launch, check_trained, left_running, steps, topology, write_topology

ROLES = {
    "rollout-0": ("actors.rollout",),
    "teacher-0": ("actors.teacher",),
    "student-engine-0": ("actors.engine.server", "student"),
    "teacher-engine-0": ("actors.engine.server", "teacher"),
    "intake-0": ("actors.intake",),
    "learner-0": ("learner.main",),
}


RULES = {
    ("tokens", "deadline"): tuple(ROLES),
    ("tokens", "filled"): ("rollout-0", "student-engine-0", "learner-0"),
    ("samples", "filled"): ("teacher-0", "rollout-0", "intake-0"),
}
"""Who dies in a run of each kind: everybody in one, in the others those who know of responses and parts of steps."""
IN_SHORT = ("tokens", "filled")
"""The kind of run in which roles die in the short form of these tests."""
ENOUGH = 1000
"""Steps: no run of these tests comes to its end before what is done to it."""


def check_nothing_skipped(ranges: dict[int, list[list[int]]]) -> None:
    """Samples are taken in order: below the newest one only those in flight may be untrained."""
    assert max(ranges) + 1 - len(ranges) <= 2 * SLOTS


@pytest.mark.parametrize(
    ("train_on", "rule"), [pytest.param(*kind, marks=[] if kind == IN_SHORT else pytest.mark.long) for kind in RULES]
)
def test_every_role_may_die(inputs: Path, tmp_path: Path, train_on: str, rule: str) -> None:
    """Filled steps have sixteen parts, so that roles die in the middle of one."""
    dying = RULES[train_on, rule]
    schedule = {"schedule__steps": ENOUGH, "schedule__rule": rule, "schedule__train_on": train_on}
    schedule |= {"schedule__samples_per_step": 4}
    values = topology(inputs, tmp_path, **schedule, checkpoint__every_steps=2, rollout__resend_after_s=2.0)
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        folder = tmp_path / "run"
        for role in dying:
            run.wait_for_steps(folder, len(steps(folder)) + 2)
            run.find(*ROLES[role]).kill()
            run.wait_for_text(f"{role} ended (")
            run.wait_for_steps(folder, len(steps(folder)) + 1)
        run.stop()
    ranges = check_trained(folder, 1, len(steps(folder)))
    check_nothing_skipped(ranges)
    report = json.loads((folder / "report.json").read_text())
    assert report["restarts"] == dict.fromkeys(dying, 1)
    assert report["trained_tokens"] == sum(end - start for parts in ranges.values() for start, end, *_ in parts)
    assert left_running(tmp_path, inputs) == []


def test_resume_after_the_whole_run_was_killed(inputs: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    moments = random.Random(seed)
    file = write_topology(
        topology(inputs, tmp_path, schedule__steps=ENOUGH, schedule__rule="filled", checkpoint__every_steps=2),
        tmp_path / "run.yaml",
    )
    folder = tmp_path / "run"
    options: tuple[str, ...] = ()
    for _ in range(2):
        with Launch(file, *options) as run:
            run.wait_for_steps(folder, len(steps(folder)) + 1)
            run.wait_for_steps(folder, len(steps(folder)) + moments.randrange(4))
            family = run.family()
            run.process.kill()
            psutil.wait_procs(family, timeout=patience(20))
            assert not [process for process in family if process.is_running() and process.status() != "zombie"]
        options = ("--resume",)
    count = len(steps(folder)) + 4
    with Launch(file, "--resume", "--set", f"schedule.steps={count}") as run:
        assert run.wait() == 0, f"seed {seed}\n{run.text()}"
    ranges = check_trained(folder, 1, count)
    check_nothing_skipped(ranges)
    assert [row["step"] for row in steps(folder)] == list(range(1, count + 1)), f"seed {seed}"
    assert left_running(tmp_path, inputs) == []


@pytest.mark.long
def test_a_student_engine_may_die_when_nothing_may_be_stale(inputs: Path, tmp_path: Path) -> None:
    values = topology(inputs, tmp_path, schedule__steps=ENOUGH, schedule__max_staleness=0)
    with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
        folder = tmp_path / "run"
        run.wait_for_steps(folder, 2)
        run.find(*ROLES["student-engine-0"]).kill()
        run.wait_for_text("student-engine-0 ended")
        run.wait_for_steps(folder, len(steps(folder)) + 3)
        run.stop()
    check_nothing_skipped(check_trained(folder, 0, len(steps(folder))))
