"""Bad input: one clear message, exit code 2, no traceback, nothing left running or half-written."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from deadlines import patience
from harness import ROOT, left_running, topology, write_topology

Edit = Callable[[dict[str, Any], Path], None]


def launch(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opd_async.launch", "--topology", str(file), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=patience(60))


def refused(file: Path, *options: str) -> str:
    """What the launcher says when it refuses; nothing may have been made."""
    before = sorted(file.parent.rglob("*"))
    ended = launch(file, *options)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 2, said
    assert "Traceback" not in said
    assert sorted(file.parent.rglob("*")) == before
    assert left_running(file.parent) == []
    return said


def prompts(text: str) -> Edit:
    def edit(values: dict[str, Any], folder: Path) -> None:
        (folder / "prompts.jsonl").write_text(text)
        values["data"]["train"]["path"] = str(folder / "prompts.jsonl")

    return edit


def at(path: str, value: Any) -> Edit:
    def edit(values: dict[str, Any], folder: Path) -> None:
        *parents, key = path.split(".")
        for parent in parents:
            values = values.setdefault(parent, {})
        values[key] = value

    return edit


def other_vocabulary(values: dict[str, Any], folder: Path) -> None:
    shutil.copytree(values["models"]["teacher"]["path"], folder / "teacher")
    file = folder / "teacher" / "tokenizer.json"
    file.write_text(file.read_text().replace('"t77"', '"<think>"'))
    values["models"]["teacher"]["path"] = str(folder / "teacher")


def other_table(values: dict[str, Any], folder: Path) -> None:
    shutil.copytree(values["models"]["teacher"]["path"], folder / "teacher")
    config = json.loads((folder / "teacher" / "config.json").read_text())
    (folder / "teacher" / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    values["models"]["teacher"]["path"] = str(folder / "teacher")


GOOD_ROW = '{"prompt": "t1 t2", "label": "x"}\n'

CASES: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "unknown key": (at("schedule.max_stalenes", 1), ("schedule.max_stalenes", "max_staleness")),
    "wrong type": (at("schedule.steps", "many"), ("schedule.steps", "many")),
    "missing model": (at("models.student.path", "no/such/model"), ("models.student.path", "no/such/model")),
    "missing prompts": (at("data.train.path", "no/such.jsonl"), ("no/such.jsonl",)),
    "broken line": (prompts(GOOD_ROW + '{"prompt": "t1\n'), ("prompts.jsonl:2",)),
    "empty prompts": (prompts(""), ("prompts.jsonl", "no prompts")),
    "prompts too long": (prompts('{"prompt": "%s"}\n' % ("t1 " * 300)), ("prompts.jsonl", "tokens")),
    "vocabularies": (other_vocabulary, ("models.teacher", "77", "'t77'", "'<think>'")),
    "tables": (other_table, ("models.teacher", "512", "256")),
    "device twice": (
        lambda values, folder: (
            at("engines.student.devices", ["cuda:0"])(values, folder),
            at("learner.devices", ["cuda:0"])(values, folder),
            None,
        )[-1],
        ("cuda:0", "student-engine-0", "learner rank 0"),
    ),
    "temperature": (at("rollout.sampling.temperature", 0.7), ("rollout.sampling.temperature", "0.7")),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_anything_starts(inputs: Path, tmp_path: Path, case: str) -> None:
    edit, words = CASES[case]
    values = topology(inputs, tmp_path / "runs")
    edit(values, tmp_path)
    said = refused(write_topology(values, tmp_path / "run.yaml"))
    assert all(word in said for word in words), said


def test_several_problems_are_reported_at_once(inputs: Path, tmp_path: Path) -> None:
    values = topology(inputs, tmp_path / "runs")
    values["schedule"]["steps"] = 0
    values["learner"]["micro_batch_token"] = 5
    said = refused(write_topology(values, tmp_path / "run.yaml"))
    assert "schedule.steps" in said and "learner.micro_batch_token" in said


def test_malformed_yaml_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: [unclosed\nmodels: {}\n")
    said = refused(tmp_path / "run.yaml")
    assert "run.yaml:" in said
    assert "nothing.yaml" in refused(tmp_path / "nothing.yaml")


def test_port_taken(inputs: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        values = topology(inputs, tmp_path / "runs", network__base_port=min(port, 65000))
        said = refused(write_topology(values, tmp_path / "run.yaml"))
    assert str(port) in said


def test_long_prompts_are_counted_and_skipped(inputs: Path, tmp_path: Path) -> None:
    values = topology(inputs, tmp_path / "runs")
    prompts(GOOD_ROW + '{"prompt": "%s"}\n' % ("t1 " * 300))(values, tmp_path)
    ended = launch(write_topology(values, tmp_path / "run.yaml"), "--dry-run")
    assert ended.returncode == 0 and "skipped 1 prompt" in ended.stdout
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def stopped_run(inputs: Path, tmp_path: Path) -> Path:
    """The topology of a run whose folder looks as a killed run leaves it: one sealed checkpoint."""
    from opd_async.config.topology_file import load_topology
    from opd_async.plan.resolve import make_plan
    from opd_async.run import checkpoints
    from opd_async.run.run_folder import prepare
    from opd_async.scheduling import frontier

    file = write_topology(topology(inputs, tmp_path / "runs"), tmp_path / "run.yaml")
    with prepare(make_plan(load_topology(file))) as folder:
        checkpoint = checkpoints.step_folder(folder.path / "checkpoints", 4)
        frontier.save(frontier.empty(4), checkpoint)
        checkpoints.seal(checkpoint, 4)
    return file


def test_resume_with_another_topology(stopped_run: Path) -> None:
    values = yaml.safe_load(stopped_run.read_text())
    values["schedule"]["max_staleness"] = 2
    said = refused(write_topology(values, stopped_run), "--resume")
    assert "schedule.max_staleness" in said


def test_resume_from_a_checkpoint_cut_short(stopped_run: Path) -> None:
    [file] = (stopped_run.parent / "runs").rglob("frontier.msgpack")
    file.write_bytes(file.read_bytes()[:-3])
    said = refused(stopped_run, "--resume")
    assert "frontier.msgpack" in said and "cut short" in said


def test_a_folder_that_holds_a_run(stopped_run: Path) -> None:
    said = refused(stopped_run)
    assert "--resume" in said and "--overwrite" in said
