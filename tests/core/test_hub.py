"""Models by name: fetched once from a hub, refused in words where that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience
from small_hub import COMMIT, GATED, hub_of
from small_runs import make_model, topology_data, write_lines, write_topology

from opd_async.config.topology import Topology
from opd_async.data.hub import is_hub_name


def data_by_name(root: Path, **student: Any) -> dict[str, Any]:
    """A valid topology whose student is `owner/student`, which a hub of `root / "hub"` has."""
    data = topology_data(root)
    make_model(root / "hub" / "owner" / "student")
    data["models"]["student"] = {"path": "owner/student", **student}
    return data


def opd(root: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, since huggingface_hub reads its settings once."""
    settings = {"HF_HOME": str(root / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "opd_async.cli", *words],
        cwd=root,
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        timeout=patience(60),
    )


def test_a_model_is_fetched_once_and_found_without_a_hub_afterwards(tmp_path: Path) -> None:
    file = write_topology(tmp_path, data_by_name(tmp_path))
    with hub_of(tmp_path / "hub") as (url, asked):
        first = opd(tmp_path, "check", str(file), HF_ENDPOINT=url)
        assert first.returncode == 0, first.stderr
        assert f"snapshots/{COMMIT}" in first.stdout  # the engine gets a folder that names the commit
        assert f"models.student: owner/student of the hub, commit {COMMIT[:12]}: " in first.stdout
        fetched = [path for path in asked if "/resolve/" in path]
        assert f"/owner/student/resolve/{COMMIT}/model.safetensors" in fetched
        asked.clear()
        assert opd(tmp_path, "check", str(file), HF_ENDPOINT=url).returncode == 0
        assert [path for path in asked if "/resolve/" in path] == []
    offline = opd(tmp_path, "check", str(file), HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    unreachable = opd(tmp_path, "check", str(file), HF_ENDPOINT=url)
    assert unreachable.returncode == 0, unreachable.stderr


@pytest.mark.parametrize(
    ("student", "environment", "words"),
    [
        ({"path": "owner/none"}, {}, "owner/none: no such folder here, and the hub ("),
        ({"path": GATED}, {}, "owner/gated: its owner lets in only those who accepted the licence"),
        ({"revision": "v9"}, {}, "owner/student at revision v9: the hub has the model, and no such revision"),
        ({}, {"HF_HUB_OFFLINE": "1"}, "owner/student: no such folder here, it is not in the cache, and HF_HUB_OFFLINE"),
        ({}, {"HF_ENDPOINT": "http://127.0.0.1:1"}, "(http://127.0.0.1:1) could not be reached"),
        (
            {"path": "student", "revision": "main"},
            {},
            "models.student.revision: student is no name of the hub; remove it",
        ),
    ],
)
def test_what_cannot_be_had_is_one_message(
    tmp_path: Path, student: dict[str, Any], environment: dict[str, str], words: str
) -> None:
    file = write_topology(tmp_path, data_by_name(tmp_path, **student))
    with hub_of(tmp_path / "hub") as (url, _):
        ended = opd(tmp_path, "check", str(file), **{"HF_ENDPOINT": url} | environment)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[0] == f"error: {file}: 1 problem"
    assert words in ended.stderr


def test_a_file_that_is_cut_short_is_no_model(tmp_path: Path) -> None:
    file = write_topology(tmp_path, data_by_name(tmp_path))
    weights = tmp_path / "hub" / "owner" / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with hub_of(tmp_path / "hub") as (url, _):
        ended = opd(tmp_path, "check", str(file), HF_ENDPOINT=url)
    assert ended.returncode == 2
    assert "model.safetensors" in ended.stderr


def test_a_topology_is_made_for_names_of_the_hub(tmp_path: Path) -> None:
    """Models and prompts, as they are written on the command line."""
    data_by_name(tmp_path)
    make_model(tmp_path / "hub" / "owner" / "teacher")
    rows = tmp_path / "hub" / "datasets" / "owner" / "maths"
    rows.mkdir(parents=True)
    write_lines(rows / "train.jsonl", {"question": "1+1="})
    words = ("init", "owner/student", "owner/teacher", "hf://owner/maths", "--prompt-key", "question")
    with hub_of(tmp_path / "hub") as (url, _):
        ended = opd(tmp_path, *words, "--response", "20", "--output", "mine.yaml", HF_ENDPOINT=url)
    assert ended.returncode == 0, ended.stderr
    assert "/owner--maths-" in ended.stdout and ": 1 prompts, " in ended.stdout
    found = Topology.load(tmp_path / "mine.yaml")
    assert found.models.teacher is not None and found.data.train is not None
    assert [str(one.path) for one in (found.models.student, found.models.teacher)] == ["owner/student", "owner/teacher"]
    assert 'path: "hf://owner/maths"' in (tmp_path / "mine.yaml").read_text()
    offline = opd(tmp_path, "check", "mine.yaml", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


LOOK = """
import sys
from pathlib import Path
from opd_async.cluster.service import look_at
from opd_async.errors import InputError
from opd_async.transport import messages as m
here = Path.cwd()
(here / "seen").write_text("nonce")
files = {"folder": str(here), "seen": str(here / "seen"), "mine": str(here / "mine")}
try:
    look_at(m.LookAt(request=1, nonce="nonce", paths=[sys.argv[1]], **files))
except InputError as error:
    sys.exit(str(error))
"""


def test_every_host_fetches_the_models_that_the_launcher_has(tmp_path: Path) -> None:
    """As an agent does it, whose host has a cache of its own under the same path, or under another one."""
    data_by_name(tmp_path)

    def look(cache: Path, path: Path, url: str) -> subprocess.CompletedProcess[str]:
        environment = {"HF_HOME": str(cache), "HF_ENDPOINT": url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return subprocess.run(
            [sys.executable, "-c", LOOK, str(path)],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=patience(60),
            check=False,
        )

    folder = tmp_path / "cache/hub/models--owner--student/snapshots" / COMMIT
    with hub_of(tmp_path / "hub") as (url, asked):
        for _ in range(2):
            found = look(tmp_path / "cache", folder, url)
            assert found.returncode == 0, found.stderr
        assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
        assert sum(path.endswith("model.safetensors") and "/resolve/" in path for path in asked) <= 2, "once"
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))  # as if a fetch had broken off
        asked.clear()
        assert look(tmp_path / "cache", folder, url).returncode == 0 and asked, "the hub is asked for what is missing"
        (folder / "model.safetensors.index.json").unlink()
        there = tmp_path / "launchers" / folder.relative_to(tmp_path / "cache")
        elsewhere = look(tmp_path / "other", there, url)
    assert elsewhere.returncode == 1
    words = f"{there}: the launcher's host has the model there, and this host's cache is {tmp_path}/other/hub"
    assert elsewhere.stderr.splitlines()[-1] == f"{words}; set HF_HOME alike on every host"


def test_a_plan_fetches_no_weights(tmp_path: Path) -> None:
    file = write_topology(tmp_path, data_by_name(tmp_path))
    with hub_of(tmp_path / "hub") as (url, asked):
        ended = opd(tmp_path, "plan", str(file), HF_ENDPOINT=url)
    assert ended.returncode == 0, ended.stderr
    assert [path for path in asked if "safetensors" in path] == []


def test_names_of_the_hub_are_told_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    names = {"Qwen/Qwen3-8B": True, "models/student": False, "student": False, "./Qwen/x": True, "a/b/c": False}
    assert {name: is_hub_name(Path(name)) for name in names} == names
    assert not is_hub_name(tmp_path / "models")
    assert Topology.model_validate(topology_data(tmp_path)).models.student.revision is None
