"""Run folders: one launch at a time, no run lost or mixed up by mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import small_topology

from opd_async.config.topology_file import load_topology
from opd_async.errors import InputError
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import make_plan
from opd_async.run.run_folder import holds_run, prepare


def plan_of(root: Path, *overrides: str) -> Plan:
    return make_plan(small_topology(root, *overrides))


def saved_plan(folder: Path) -> Plan:
    return Plan.model_validate_json((folder / "plan.json").read_text())


def refused(plan: Plan, resume: bool = False, overwrite: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        prepare(plan, resume, overwrite)
    return str(caught.value)


def test_a_new_folder_gets_the_topology_and_the_plan(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "engines.student.api_key=s3cret")
    assert not holds_run(plan.run_folder)
    with prepare(plan) as folder:
        assert folder.path == plan.run_folder and holds_run(folder.path)
        assert load_topology(folder.path / "topology.yaml") == plan.topology
        assert saved_plan(folder.path) == plan
        names = sorted(path.name for path in folder.path.iterdir())
        assert names == [".lock", "plan.json", "topology.yaml"]
        assert all((folder.path / name).stat().st_mode & 0o077 == 0 for name in names)
    folder.release()


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    prepare(plan).release()
    assert "holds a run already; --resume goes on with it, --overwrite removes it" in refused(plan)
    assert "contradict each other" in refused(plan, resume=True, overwrite=True)


def test_overwrite_removes_what_a_run_made_and_nothing_else(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    folder = plan.run_folder
    prepare(plan).release()
    elsewhere = tmp_path / "big_disk"
    for place in (elsewhere / "step_00000001", folder / "logs", folder / "mine"):
        place.mkdir(parents=True)
        (place / "file").write_text("x")
    (folder / "checkpoints").symlink_to(elsewhere)
    for name in ("metrics.jsonl", "notes.txt"):
        (folder / name).write_text("x")
    changed = plan_of(tmp_path, "seed=5")
    prepare(changed, overwrite=True).release()
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".lock", "mine", "notes.txt", "plan.json", "topology.yaml"]
    assert (elsewhere / "step_00000001" / "file").exists() and (folder / "mine" / "file").exists()
    assert saved_plan(folder).topology.seed == 5


def test_resume_allows_only_documented_changes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert "no run to resume; start it without --resume" in refused(plan, resume=True)
    prepare(plan).release()
    allowed = ["schedule.steps=99", "checkpoint.keep=7", "evaluation.prompts=3", "supervisor.restarts=9"]
    later = plan_of(tmp_path, *allowed, "network.base_port=40000")
    prepare(later, resume=True).release()
    assert load_topology(plan.run_folder / "topology.yaml") == later.topology
    other = ["seed=1", "learner.optimizer.lr=0.5", "engines.teacher.api_key=s3cret", "schedule.max_staleness=2"]
    text = refused(plan_of(tmp_path, *allowed, *other), resume=True)
    assert [line.strip() for line in text.splitlines()[1:]] == [
        "seed: was 0, now 1",
        "schedule.max_staleness: was 1, now 2",
        "engines.teacher.api_key: changed",
        "learner.optimizer.lr: was 1e-06, now 0.5",
    ]
    assert "s3cret" not in text
    assert load_topology(plan.run_folder / "topology.yaml") == later.topology
    # A refusal must not keep the lock.
    prepare(later, resume=True).release()


def test_a_moved_run_can_be_resumed(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    prepare(plan).release()
    moved = tmp_path / "moved"
    (tmp_path / "runs").rename(moved)
    with prepare(plan_of(tmp_path, f"run_dir={moved}"), resume=True) as folder:
        assert folder.path == moved / "small"


def test_a_second_launch_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    with prepare(plan):
        text = refused(plan, overwrite=True)
        assert f"process {os.getpid()} is running in this folder" in text
        assert holds_run(plan.run_folder)
    prepare(plan, overwrite=True).release()


HOLDER = """
import pathlib, sys
from opd_async.plan.plan import Plan
from opd_async.run.run_folder import prepare
folder = prepare(Plan.model_validate_json(pathlib.Path(sys.argv[1]).read_text()))
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    file = tmp_path / "plan.json"
    file.write_text(plan.model_dump_json())
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert f"process {holder.pid} is running in this folder" in refused(plan, resume=True)
        holder.kill()
        holder.wait(timeout=30)
    prepare(plan, resume=True).release()


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    (tmp_path / "runs").write_text("a file")
    assert "cannot be used as a run folder" in refused(plan)
