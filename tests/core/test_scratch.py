"""Temporary files of a run: removed with it, and by the next run if it was killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from deadlines import patience

from opd_async.cluster.scratch import PREFIX, Scratch, remove_abandoned
from opd_async.cluster.supervisor import ProcessSpec, Supervisor


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_folder_lasts_as_long_as_its_owner(temporary: Path) -> None:
    with Scratch() as one, Scratch() as two:
        assert one is not None and two is not None and one != two
        (one / "left").mkdir()
        remove_abandoned()
        assert sorted(temporary.iterdir()) == sorted([one, two])
    assert list(temporary.iterdir()) == []


def test_what_a_killed_owner_has_left_is_removed_by_the_next(temporary: Path) -> None:
    other = temporary / f"{PREFIX}of-somebody-who-is-starting"
    other.mkdir()
    code = f"import tempfile; tempfile.tempdir = {str(temporary)!r}\n"
    code += "from opd_async.cluster.scratch import Scratch\n"
    code += "with Scratch() as folder:\n    print(folder, flush=True)\n    input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        remove_abandoned()
        assert folder.is_dir()
        owner.kill()
        owner.wait()
    assert folder.is_dir()
    with Scratch() as mine:
        assert sorted(temporary.iterdir()) == sorted([mine, other])


async def test_the_temporary_files_of_roles_are_there_and_go_with_the_supervisor(temporary: Path) -> None:
    said = temporary / "said"
    code = f"import tempfile; open({str(said)!r}, 'w').write(tempfile.mkdtemp())"
    async with Supervisor(print, patience(5)) as supervisor:
        spec = ProcessSpec("role", (sys.executable, "-c", code), {}, temporary / "role.log")
        await supervisor.start(spec)
        async with asyncio.timeout(patience(20)):
            await supervisor.exits.get()
        made = _made(said, temporary)
    assert not _is_there(made.parent)


def _made(said: Path, temporary: Path) -> Path:
    made = Path(said.read_text())
    assert made.is_dir() and made.parent.name.startswith(PREFIX) and made.parent.parent == temporary
    return made


def _is_there(folder: Path) -> bool:
    return folder.exists()


def test_without_room_for_temporary_files_there_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no-such-folder")
    with Scratch() as folder:
        assert folder is None
