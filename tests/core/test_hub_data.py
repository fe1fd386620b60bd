"""Data sets by name: fetched through `datasets`, read as a file, refused in words where they cannot be had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_hub import GATED, hub_of
from small_runs import topology_data, write_lines, write_topology
from test_hub import opd

from opd_async.data.hub_data import is_data_set, name_of
from opd_async.errors import InputError

MATHS = "hf://owner/maths"


def data_by_name(root: Path, **sections: Any) -> Path:
    """A valid topology whose prompts are of `owner/maths`, which a hub of `root / "hub"` has."""
    data, folder = topology_data(root), root / "hub" / "datasets" / "owner" / "maths"
    folder.mkdir(parents=True)
    write_lines(folder / "train.jsonl", *({"question": f"{n}+1=", "answer": str(n + 1)} for n in range(8)))
    write_lines(folder / "test.jsonl", *({"question": f"{n}+2=", "answer": str(n + 2)} for n in range(3)))
    keys = {"path": MATHS, "prompt_key": "question", "label_key": "answer"}
    data["data"] = {"train": keys, "held_out": keys | {"split": "test"}}
    for key, section in sections.items():
        data["data"][key] = keys | section
    return write_topology(root, data)


def test_a_split_is_fetched_once_and_found_without_a_hub_afterwards(tmp_path: Path) -> None:
    file = data_by_name(tmp_path, train={"split": "train[:6]"})
    with hub_of(tmp_path / "hub") as (url, _):
        first = opd(tmp_path, "check", str(file), HF_ENDPOINT=url)
    assert first.returncode == 0, first.stderr
    assert "data.train.path: hf://owner/maths is looked for on the hub" in first.stdout + first.stderr
    offline = opd(tmp_path, "check", str(file), HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    files = sorted((tmp_path / "cache" / "datasets" / "opd_async").iterdir())
    assert len(files) == 2 and all(one.name.startswith("owner--maths-") for one in files)  # not again, and no remains
    for out in (first.stdout, offline.stdout):
        assert "6 prompts" in out and "3 prompts" in out


def test_what_cannot_be_had_is_one_message_each(tmp_path: Path) -> None:
    bad = {"train": {"split": "nope"}, "held_out": {"path": "hf://owner/none"}}
    file = data_by_name(tmp_path, **bad, completions={"path": f"hf://{GATED}", "completion_key": "answer"})
    text = yaml.safe_load(file.read_text())
    del text["data"]["completions"]["label_key"]
    write_topology(tmp_path, text)
    (tmp_path / "hub" / "datasets" / GATED).mkdir()
    with hub_of(tmp_path / "hub") as (url, _):
        ended = opd(tmp_path, "check", str(file), HF_ENDPOINT=url)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {file}: ")
    assert 'hf://owner/maths: Unknown split "nope". Should be one of [' in ended.stderr
    assert "data.held_out.path: hf://owner/none: " in ended.stderr and "correct the name" in ended.stderr
    assert "hf://owner/gated: its owner lets in only those who accepted the conditions" in ended.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "it is not in the cache, and HF_HUB_OFFLINE forbids"),
        (
            {"HF_ENDPOINT": "http://127.0.0.1:1"},
            "not in the cache, and the hub (http://127.0.0.1:1) could not",
        ),
    ],
)
def test_without_a_hub(tmp_path: Path, environment: dict[str, str], words: str) -> None:
    ended = opd(tmp_path, "check", str(data_by_name(tmp_path)), **environment)
    assert ended.returncode == 2 and words in ended.stderr, ended.stderr


def test_without_the_extra_and_with_keys_of_a_hub_for_a_file(tmp_path: Path) -> None:
    file = data_by_name(tmp_path, held_out={"path": str(write_lines(tmp_path / "a.jsonl", {})), "split": "test"})
    (tmp_path / "less").mkdir()
    (tmp_path / "less" / "datasets.py").write_text("raise ImportError('not here')")
    paths = os.pathsep.join([str(tmp_path / "less"), os.environ.get("PYTHONPATH", "")])
    ended = opd(tmp_path, "check", str(file), PYTHONPATH=paths)
    assert ended.returncode == 2
    assert "a data set of the hub needs datasets (not here); run: pip install 'opd_async[datasets]'" in ended.stderr
    assert "data.held_out.split: " in ended.stderr and "is no data set of the hub; remove it" in ended.stderr


def test_names_of_data_sets() -> None:
    names = {MATHS: True, "hf/owner": False, "data.jsonl": False, "/hf:/a": False}
    assert {text: is_data_set(Path(text)) for text in names} == names
    assert name_of(Path(MATHS)) == "owner/maths"
    for wrong in ("hf://maths", "hf://a/b/c", "hf://a/*"):
        with pytest.raises(InputError, match="no name of a data set; write hf://owner/name"):
            name_of(Path(wrong))
