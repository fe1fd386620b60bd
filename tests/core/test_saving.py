"""What a run does where no disk takes what it has to keep: what else can be saved is, and the words are right."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import small_topology

from opd_async.command import explain
from opd_async.errors import RoleError, StorageError
from opd_async.files import reserve, storage_failure, storing, unwritten
from opd_async.run import checkpoints, saving
from opd_async.run.learner_commands import LearnerCommands
from opd_async.run.saving import EXPORT, Saving
from opd_async.telemetry.progress import Progress
from opd_async.telemetry.role_log import RoleLog, everything
from opd_async.telemetry.terminal import Terminal
from opd_async.telemetry.trace import OFF
from opd_async.transport import messages as m
from opd_async.transport.messages import ExportModel, SaveCheckpoint

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/frontier.msgpack")


def write(folder: Path) -> None:
    (folder / "learner").mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "learner/.metadata", "learner/__0_0.distcp"):
        (folder / name).write_text("{}")


class Disk:
    """A learner that writes a file, or says that there is no room; a ledger that does so too."""

    def __init__(self, root: Path, *settings: str, refuse: Callable[[str, int], bool]) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.root = root / "checkpoints"
        self._refuse = refuse
        topology = small_topology(root, *settings)
        plan = SimpleNamespace(topology=topology, run_folder=root)
        ledger = SimpleNamespace(save=lambda folder: (folder / "ledger.json").write_text("{}"))
        mailbox = SimpleNamespace(expect=self._expect)
        self.dispatcher: Any = SimpleNamespace(
            plan=plan, ledger=ledger, mailbox=mailbox, to_intake=self._to_intake, answers=[], trace=OFF
        )
        progress = Progress(self.said.append, 10)
        self.saving = Saving(self.dispatcher, LearnerCommands(self.dispatcher, 1.0), progress)

    async def _to_intake(self, command: SaveCheckpoint | ExportModel) -> None:
        name = type(command).__name__
        self.asked.append(name)
        folder = Path(command.folder)
        problem, stats = None, dict[str, float]()
        if self._refuse(name, len(list(self.root.glob("step_*/complete.json")))):
            problem = unwritten(folder, FULL)
        else:
            write(folder)
            stats = checkpoints.Shards(1, 2).stats() if name == "SaveCheckpoint" else {}
        self.dispatcher.answers.append(m.LearnerReply(name, 0, problem, stats))

    async def _expect(self, key: Any, deadline_s: float, who: str, at_work: bool = False) -> Any:
        return self.dispatcher.answers.pop(0)

    def sealed(self) -> list[int]:
        return [int(path.parent.name[5:]) for path in sorted(self.root.glob("step_*/complete.json"))]

    def run(self, step: int) -> None:
        asyncio.run(self.saving.due(step))


def test_the_oldest_checkpoint_makes_room_for_the_one_behind_which_it_would_go(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "checkpoint.every_steps=1", "checkpoint.keep=2", refuse=lambda name, sealed: sealed > 1)
    for step in (1, 2, 3):
        disk.run(step)
    assert disk.sealed() == [2, 3]
    (line,) = disk.said
    assert "/data/frontier.msgpack cannot be written: No space left on device; make room there" in line
    assert "removed step_00000001, the oldest checkpoint, and trying again" in line


def test_the_newest_checkpoint_never_goes_and_the_student_alone_is_exported(tmp_path: Path) -> None:
    settings = ("checkpoint.every_steps=1", "checkpoint.keep=1", "checkpoint.export_hf=true")
    disk = Disk(tmp_path, *settings, refuse=lambda name, sealed: name == "SaveCheckpoint" and sealed > 0)
    disk.run(1)
    with pytest.raises(StorageError) as caught:
        disk.run(2)
    assert disk.sealed() == [1] and (tmp_path / EXPORT / "step_00000002/config.json").is_file()
    assert str(caught.value) == (
        "no checkpoint after step 2: /data/frontier.msgpack cannot be written: No space left on device; make room "
        "there. The last checkpoint is step_00000001: go on from it with --resume. The student after step 2 is in "
        f"{tmp_path}/export/step_00000002"
    )
    assert not checkpoints.step_folder(disk.root, 2).exists(), "half of it takes room, and is of no use"


def test_the_first_checkpoint_finds_no_room(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "checkpoint.every_steps=1", "checkpoint.export_hf=false", refuse=lambda *_: True)
    with pytest.raises(StorageError, match=r"There is no earlier checkpoint: start afresh with --overwrite$"):
        disk.run(1)
    assert disk.asked == ["SaveCheckpoint"]


def test_an_export_that_finds_no_room_leaves_a_checkpoint(tmp_path: Path) -> None:
    settings = ("checkpoint.every_steps=50", "checkpoint.export_hf_every_steps=2")
    disk = Disk(tmp_path, *settings, refuse=lambda name, sealed: name == "ExportModel")
    disk.run(1)
    with pytest.raises(StorageError, match=r"A checkpoint after step 2 is saved: go on from it with --resume"):
        disk.run(2)
    assert disk.sealed() == [2]


def test_the_launchers_own_files_may_be_those_without_room(tmp_path: Path) -> None:
    disk = Disk(tmp_path, "checkpoint.every_steps=1", "checkpoint.export_hf=false", refuse=lambda *_: False)

    def full(folder: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder / "ledger.json"))

    disk.dispatcher.ledger.save = full
    with pytest.raises(StorageError, match=r"ledger.json cannot be written: Read-only file system; make that file"):
        disk.run(1)
    assert disk.sealed() == []


LOST = [
    ("learner/.metadata", None, "0 of 0"),
    ("learner/__0_0.distcp", None, "0 of 0"),
    ("learner/__0_0.distcp", "{", "1 of 1"),
    ("learner/__1_0.distcp", "{}", "2 of 4"),
]


@pytest.mark.parametrize(("lost", "left", "here"), LOST)
def test_a_checkpoint_without_the_learners_files_is_none(
    lost: str, left: str | None, here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, "checkpoint.every_steps=1", "checkpoint.keep=2", refuse=lambda *_: False)
    disk.run(1)
    disk.run(2)
    whole = write

    def elsewhere(folder: Path) -> None:
        whole(folder)
        if left is None:
            (folder / lost).unlink()
        else:
            (folder / lost).write_text(left)

    monkeypatch.setitem(globals(), "write", elsewhere)
    monkeypatch.setattr(saving, "SEEN_S", 0.0)
    with pytest.raises(RoleError, match=rf"have written 1 files of 2 bytes in all, and {here} bytes are here; put run"):
        disk.run(3)
    assert disk.sealed() == [1, 2], "nothing makes room for what would not be whole"


def test_what_another_host_has_written_may_be_seen_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system, which remembers for a while what a folder had in it."""
    disk = Disk(tmp_path, "checkpoint.every_steps=1", refuse=lambda *_: False)
    looked, here = [], checkpoints.shards_here

    def late(folder: Path) -> checkpoints.Shards:
        looked.append(folder)
        return checkpoints.Shards(0, 0) if len(looked) < 3 else here(folder)

    monkeypatch.setattr(checkpoints, "shards_here", late)
    monkeypatch.setattr(saving, "LOOK_S", 0.01)
    disk.run(1)
    assert disk.sealed() == [1] and len(looked) == 3


def test_a_learner_says_what_it_has_written() -> None:
    assert checkpoints.Shards.said(checkpoints.Shards(3, 1 << 40).stats()) == checkpoints.Shards(3, 1 << 40)
    with pytest.raises(RoleError, match="does not say what it has written"):
        checkpoints.Shards.said({"loss": 1.0})


def test_what_cannot_be_removed_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, "checkpoint.every_steps=1", refuse=lambda *_: False)

    def busy(root: Path, keep: int, spared: Path | None) -> list[Path]:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(root / "step_00000000"))

    monkeypatch.setattr(checkpoints, "prune", busy)
    disk.run(1)
    assert disk.sealed() == [1] and "step_00000000 cannot be removed: Device or resource busy" in disk.said[0]


class ByRank(Exception):
    """As torch.distributed.checkpoint reports what ranks could not do."""

    def __init__(self, error: Exception) -> None:
        super().__init__("write failed")
        self.failures = {1: (error, None)}


def test_the_disks_error_is_found_however_it_is_wrapped() -> None:
    torch_error = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    torch_error.__context__ = FULL
    assert storage_failure(ExceptionGroup("all", [RoleError("x"), ByRank(torch_error)])) is FULL
    assert storage_failure(RuntimeError("no disk in it")) is None
    assert storage_failure(OSError(errno.ECONNREFUSED, "no disk either")) is None


def test_a_copy_names_what_was_to_be_written() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/models/tokenizer.json", None, "/runs/export.tmp/t.json")
    assert unwritten(Path("/runs"), error).startswith("/runs/export.tmp/t.json cannot be written: No space left")


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    reserve(tmp_path, 1 << 20)
    with pytest.raises(OSError, match=r"No space left on device") as caught:
        reserve(tmp_path, 1 << 60)
    assert caught.value.filename == str(tmp_path) and list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=r"No such file or directory; see to that disk"), storing(tmp_path):
        reserve(tmp_path / "nowhere", 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_full_disk_anywhere_is_no_defect_of_the_program(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with Terminal() as terminal:
        code = explain(ExceptionGroup("all", [OSError(number, os.strerror(number), "/data/x")]), terminal)
    printed = capfd.readouterr().err
    assert code == 1 and f"error: /data/x cannot be written: {os.strerror(number)}; " in printed
    assert "defect" not in printed


def test_lines_that_a_log_has_no_room_for_are_counted(tmp_path: Path) -> None:
    said, lost = list[str](), list[int]()
    log = RoleLog("role", tmp_path / "role.log", "header", said.append, everything, on_unwritten=lost.append)
    assert log._file is not None
    log._file.close()
    with Path("/dev/full").open("wb", buffering=0) as full:
        log._file = full
        log._file_lines(["one", "two"])
        log._file_lines(["three"])
    assert sum(lost) == 3 and log.tail == ("one", "two", "three")
    assert [line for line in said if "cannot be written" in line] == [
        f"role | log {tmp_path}/role.log cannot be written: No space left on device; it goes on without it"
    ]
