"""Run folders: one launch at a time, no run lost or mixed up by mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience
from small_runs import small_topology, write_json, write_lines

from opd_async.checks.inputs import read_inputs
from opd_async.config.resuming import Change, may_change
from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology
from opd_async.errors import InputError
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import make_plan
from opd_async.run.fingerprints import fingerprints
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
    later = plan_of(tmp_path, *allowed, "network.base_port=40000", "engines.teacher.api_key=s3cret")
    prepare(later, resume=True).release()
    assert load_topology(plan.run_folder / "topology.yaml") == later.topology
    other = ["seed=1", "learner.optimizer.lr=0.5", "engines.teacher.api_key=s3cret", "schedule.max_staleness=2"]
    text = refused(plan_of(tmp_path, *allowed, *other), resume=True)
    assert [line.strip() for line in text.splitlines()[1:]] == [
        "seed: was 0, now 1",
        "schedule.max_staleness: was 1, now 2",
        "learner.optimizer.lr: was 1e-06, now 0.5; --change-lr allows it",
    ]
    assert "s3cret" not in text
    assert load_topology(plan.run_folder / "topology.yaml") == later.topology
    # A refusal must not keep the lock.
    prepare(later, resume=True).release()


PLACE = [
    *(
        "learner.micro_batch_tokens=64",
        "learner.recompute=true",
        "learner.tensor_parallel=2",
        "learner.data_parallel=2",
    ),
    *("learner.pipeline_parallel=2", "learner.devices=[cuda:0]", "learner.bucket_mib=1", "learner.threads=2"),
    *("engines.student.kv_tokens=2048", "engines.student.replicas=2", "engines.teacher.devices=[cuda:1]"),
    *("engines.student.max_running=3", "engines.student.python=/usr/bin/python3", "rollout.replicas=2"),
    *("rollout.slots=3", "rollout.request_deadline_s=7", "teacher.replicas=2", "teacher.batch_tokens=99"),
    *("supervisor.step_deadline_s=9", "supervisor.evaluation_deadline_s=9", "reward.workers=2"),
]
RUN = [
    *("seed=3", "schedule.tokens_per_step=3", "schedule.max_staleness=0", "schedule.train_on=samples"),
    *("opd.loss=forward_kl_topk", "opd.kl_coef=0.5", "opd.clip_ratio=0.1", "learner.optimizer.weight_decay=0.1"),
    *("learner.optimizer.beta2=0.9", "learner.dtype=bfloat16", "rollout.group_size=2", "data.shuffle=false"),
    *("rollout.sampling.max_response_tokens=31", "engines.student.dtype=bfloat16", "engines.student.context_tokens=63"),
    *("learner.loss_mean=responses", "advantage.gamma=0.5", "data.train.prompt_key=text", "name=other"),
]


@pytest.mark.parametrize("change", PLACE)
def test_keys_of_the_place_may_change(tmp_path: Path, change: str) -> None:
    prepare(plan_of(tmp_path)).release()
    now = plan_of(tmp_path).model_copy(update={"topology": small_topology(tmp_path, change)})
    prepare(now, resume=True).release()
    assert may_change(change.partition("=")[0]) is Change.YES


@pytest.mark.parametrize("change", RUN)
def test_keys_of_the_run_may_not(tmp_path: Path, change: str) -> None:
    prepare(plan_of(tmp_path)).release()
    now = plan_of(tmp_path).model_copy(update={"topology": small_topology(tmp_path, change)})
    assert f"  {change.partition('=')[0]}: was " in refused(now, resume=True)
    assert may_change(change.partition("=")[0]) is Change.NO


def test_the_learning_rate_may_change_with_a_flag(tmp_path: Path) -> None:
    prepare(plan_of(tmp_path)).release()
    later = plan_of(tmp_path, "learner.optimizer.lr=0.5", "learner.optimizer.decay=cosine")
    assert "--change-lr allows it" in refused(later, resume=True)
    prepare(later, resume=True, change_lr=True).release()
    assert may_change("learner.optimizer.lr") is Change.WITH_FLAG


def test_the_same_keys_of_several_teachers() -> None:
    assert may_change("engines.teachers.maths.kv_tokens") is Change.YES
    assert may_change("engines.teachers.maths.dtype") is Change.NO
    assert may_change("models.teachers.maths.path") is Change.SAME_CONTENT


def found(topology: Topology) -> dict[str, str]:
    inputs = read_inputs(topology)
    return fingerprints(topology, inputs.prompts, inputs.held_out, inputs.completions)


def swapped(key: str) -> Callable[[Path], Any]:
    """Writes something else under the path of a section of the fingerprints."""
    model, row = key.partition("models.")[2], {"prompt": "cab", "label": "3"}
    if not model:
        return lambda root: write_lines(root / f"{key.removeprefix('data.')}.jsonl", row)
    return lambda root: write_json(root / model / "generation_config.json", {"eos_token_id": [2]})


@pytest.mark.parametrize("key", ["data.train", "data.held_out", "models.student", "models.teacher"])
def test_other_content_under_the_same_path_is_refused(tmp_path: Path, key: str) -> None:
    held_out = f"data.held_out.path={tmp_path}/held_out.jsonl"
    write_lines(tmp_path / "held_out.jsonl", {"prompt": "ba", "label": "2"})
    plan = plan_of(tmp_path, held_out)
    prepare(plan, inputs=found(plan.topology)).release()
    prepare(plan, resume=True, inputs=found(plan.topology)).release()
    swapped(key)(tmp_path)
    with pytest.raises(InputError, match="the run began with other content in these") as caught:
        prepare(plan, resume=True, inputs=found(plan.topology))
    assert f"  {key}: {tmp_path}" in str(caught.value)


def test_only_a_label_differs(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    before = found(plan.topology)
    write_lines(tmp_path / "train.jsonl", {"prompt": "abc", "label": "1"}, {"prompt": "ab", "label": "3"})
    assert found(plan.topology).keys() == before.keys() and found(plan.topology) != before


def test_what_has_moved_and_is_the_same_may_be_named_anew(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    prepare(plan, inputs=found(plan.topology)).release()
    for name in ("train.jsonl", "teacher"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moves = [f"data.train.path={tmp_path}/moved/train.jsonl", f"models.teacher.path={tmp_path}/moved/teacher"]
    topology = load_topology(tmp_path / "topology.yaml", moves)
    prepare(plan.model_copy(update={"topology": topology}), resume=True, inputs=found(topology)).release()


def test_a_run_that_has_not_said_what_it_read_goes_on_with_the_same_paths(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    prepare(plan).release()
    inputs = found(plan.topology)
    prepare(plan, resume=True, inputs=inputs).release()
    assert json.loads((plan.run_folder / "inputs.json").read_text()) == inputs


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
        holder.wait(timeout=patience(30))
    prepare(plan, resume=True).release()


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    (tmp_path / "runs").write_text("a file")
    assert "cannot be used as a run folder" in refused(plan)
