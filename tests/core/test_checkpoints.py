"""Checkpoints: only what was sealed and is whole is resumed from."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from opd_async.errors import InputError
from opd_async.run import checkpoints

CONTENT = {"frontier.msgpack": b"y" * 10, "learner/shard.bin": b"x" * 100}


def make(root: Path, step: int, sealed: bool = True) -> Path:
    folder = checkpoints.step_folder(root, step)
    (folder / "learner").mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    if sealed:
        checkpoints.seal(folder, step)
    return folder


def test_seal_writes_every_file_with_its_size(tmp_path: Path) -> None:
    folder = make(tmp_path, 50)
    assert folder.name == "step_00000050"
    marker = json.loads((folder / "complete.json").read_text())
    assert set(marker) == {"step", "files", "seal"} and marker["step"] == 50
    hashes = {name: hashlib.blake2b(content, digest_size=32).hexdigest() for name, content in CONTENT.items()}
    assert marker["files"] == {name: {"bytes": len(CONTENT[name]), "blake2b": hashes[name]} for name in CONTENT}
    assert checkpoints.verify(folder) == 50
    checkpoints.seal(folder, 50)
    assert json.loads((folder / "complete.json").read_text()) == marker


def test_latest_is_the_newest_sealed_by_step(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "nowhere") == checkpoints.Newest(None)
    make(tmp_path, 5, sealed=False)
    assert checkpoints.newest(tmp_path).folder is None and checkpoints.chosen(tmp_path, {}) is None
    for step in (9, 10, 100_000_001, 8):
        make(tmp_path, step)
    make(tmp_path, 200_000_000, sealed=False)
    (tmp_path / "step_latest").mkdir()
    newest = checkpoints.step_folder(tmp_path, 100_000_001)
    assert checkpoints.newest(tmp_path).folder == checkpoints.chosen(tmp_path, {}) == newest
    assert checkpoints.chosen(tmp_path, checkpoints.Newest(None).environment) is None


@pytest.mark.parametrize("damage", ["short", "missing", "bit", "marker", "moved", "unreadable", "renamed"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
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
        case "bit":
            shard.write_bytes(b"x" * 50 + b"y" + b"x" * 49)
            expected = f"{shard}: is damaged"
        case "renamed":
            marker = (folder / "complete.json").read_text()
            (folder / "complete.json").write_text(marker.replace("shard.bin", "shard.bim"))
            expected = "complete.json: is damaged"
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
    found = checkpoints.newest(tmp_path)
    [(named, problem)] = found.damaged
    assert named == folder and expected in problem
    assert f"remove the folder {folder} to resume from the checkpoint before it" in problem
    before = checkpoints.step_folder(tmp_path, 20 if damage == "moved" else 10)
    assert (found.folder, found.environment) == (before, {"OPD_CHECKPOINT": before.name})
    assert checkpoints.chosen(tmp_path, found.environment) == before
    aside = checkpoints.set_aside(folder)
    assert aside.is_dir() and not folder.exists()
    assert checkpoints.newest(tmp_path) == checkpoints.Newest(before)


def test_nothing_is_begun_anew_when_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    for step in (10, 20):
        (make(tmp_path, step) / "frontier.msgpack").unlink()
    with pytest.raises(InputError, match=r"every checkpoint is damaged") as caught:
        checkpoints.newest(tmp_path)
    assert all(f"step_000000{step}" in str(caught.value) for step in (10, 20))


def test_every_flipped_bit_of_a_marker_is_noticed(tmp_path: Path) -> None:
    folder = make(tmp_path, 7)
    whole = (folder / "complete.json").read_bytes()
    for position in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        (folder / "complete.json").write_bytes(bytes(damaged))
        try:
            assert checkpoints.verify(folder) == 7
        except InputError:
            continue
        assert json.loads(damaged) == json.loads(whole)  # a space that became another


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
    assert checkpoints.prune_exports(tmp_path, 2, tmp_path / "step_00000010") == []
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
    removed = checkpoints.prune(tmp_path, 3, tmp_path / "step_00000010")
    assert [path.name for path in removed] == ["step_00000025"]
    make(tmp_path, 25, sealed=False)
    removed = checkpoints.prune(tmp_path, 2)
    assert sorted(path.name for path in removed) == ["step_00000010", "step_00000020", "step_00000025"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["notes", "step_00000030", "step_00000040", "step_00000050"]
    assert checkpoints.prune(tmp_path / "nowhere", 1) == []
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoints.prune(tmp_path, 0)
