"""Checkpoints: only what was sealed and is whole is resumed from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from opd_async.errors import InputError
from opd_async.run import checkpoints


def make(root: Path, step: int, sealed: bool = True) -> Path:
    folder = checkpoints.step_folder(root, step)
    (folder / "learner").mkdir(parents=True)
    (folder / "learner" / "shard.bin").write_bytes(b"x" * 100)
    (folder / "frontier.msgpack").write_bytes(b"y" * 10)
    if sealed:
        checkpoints.seal(folder, step)
    return folder


def test_seal_writes_every_file_with_its_size(tmp_path: Path) -> None:
    folder = make(tmp_path, 50)
    assert folder.name == "step_00000050"
    marker = json.loads((folder / "complete.json").read_text())
    assert marker == {"step": 50, "files": {"frontier.msgpack": 10, "learner/shard.bin": 100}}
    assert checkpoints.verify(folder) == 50
    checkpoints.seal(folder, 50)
    assert json.loads((folder / "complete.json").read_text()) == marker


def test_latest_is_the_newest_sealed_by_step(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "nowhere") is None
    make(tmp_path, 5, sealed=False)
    assert checkpoints.latest(tmp_path) is None
    for step in (9, 10, 100_000_001, 8):
        make(tmp_path, step)
    make(tmp_path, 200_000_000, sealed=False)
    (tmp_path / "step_latest").mkdir()
    assert checkpoints.latest(tmp_path) == checkpoints.step_folder(tmp_path, 100_000_001)


@pytest.mark.parametrize("damage", ["short", "missing", "marker", "moved", "unreadable"])
def test_a_damaged_newest_checkpoint_is_an_error_that_says_what_to_do(tmp_path: Path, damage: str) -> None:
    make(tmp_path, 10)
    folder = make(tmp_path, 20)
    shard = folder / "learner" / "shard.bin"
    match damage:
        case "short":
            shard.write_bytes(b"x" * 40)
            expected = f"{shard}: 40 bytes instead of 100"
        case "missing":
            shard.unlink()
            expected = f"{shard}: missing"
        case "marker":
            (folder / "complete.json").write_text('{"step": 20, "fi')
            expected = "is not a checkpoint marker"
        case "moved":
            shutil.copytree(tmp_path / "step_00000010", tmp_path / "step_00000030")
            folder = tmp_path / "step_00000030"
            expected = "was written for step 10"
        case _:
            (folder / "complete.json").write_text('{"step": 20, "files": 3}')
            expected = "is not a checkpoint marker"
    with pytest.raises(InputError) as caught:
        checkpoints.latest(tmp_path)
    assert expected in str(caught.value)
    assert f"remove the folder {folder} to resume from the checkpoint before it" in str(caught.value)
    shutil.rmtree(folder)
    if damage != "moved":
        assert checkpoints.latest(tmp_path) == checkpoints.step_folder(tmp_path, 10)


def test_verify_refuses_an_unsealed_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"complete\.json: cannot be read"):
        checkpoints.verify(make(tmp_path, 1, sealed=False))


def test_shards_are_those_of_a_run_or_the_folder_itself(tmp_path: Path) -> None:
    folder = checkpoints.step_folder(tmp_path, 3)
    (folder / "learner").mkdir(parents=True)
    with pytest.raises(InputError, match=r"complete\.json: cannot be read"):
        checkpoints.shards(folder)
    (folder / "learner" / ".metadata").touch()
    checkpoints.seal(folder, 3)
    assert checkpoints.shards(folder) == checkpoints.shards(folder / "learner") == folder / "learner"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no Megatron checkpoint .*hf-to-megatron"):
        checkpoints.shards(folder.parent / "empty")


def test_shards_of_a_step_or_of_the_newest(tmp_path: Path) -> None:
    for step in (3, 7):
        folder = checkpoints.step_folder(tmp_path, step)
        (folder / "learner").mkdir(parents=True)
        (folder / "learner" / ".metadata").touch()
        checkpoints.seal(folder, step)
    checkpoints.step_folder(tmp_path, 9).mkdir()  # in the making
    assert checkpoints.shards(tmp_path) == tmp_path / "step_00000007" / "learner"
    assert checkpoints.shards(tmp_path, 3) == tmp_path / "step_00000003" / "learner"
    with pytest.raises(InputError, match="has no complete checkpoint at step 9; those that it has: 3, 7"):
        checkpoints.shards(tmp_path, 9)
    with pytest.raises(InputError, match="has no complete checkpoint at step 3; those that it has: none"):
        checkpoints.shards(tmp_path / "step_00000003", 3)


def test_prune_exports_keeps_the_newest_and_the_final_one(tmp_path: Path) -> None:
    for name in ("step_00000010", "step_00000020", "step_00000030", "step_00000025.tmp", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    (tmp_path / "config.json").touch()
    removed = checkpoints.prune_exports(tmp_path, 2)
    assert [path.name for path in removed] == ["step_00000010"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["config.json", "notes", "step_00000020", "step_00000030"]
    assert checkpoints.prune_exports(tmp_path / "nowhere", 1) == []
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoints.prune_exports(tmp_path, 0)


def test_prune_keeps_the_newest_and_what_may_be_in_the_making(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    for step in (25, 50):
        make(tmp_path, step, sealed=False)
    (tmp_path / "notes").mkdir()
    removed = checkpoints.prune(tmp_path, 2)
    assert sorted(path.name for path in removed) == ["step_00000010", "step_00000020", "step_00000025"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["notes", "step_00000030", "step_00000040", "step_00000050"]
    assert checkpoints.prune(tmp_path / "nowhere", 1) == []
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoints.prune(tmp_path, 0)
