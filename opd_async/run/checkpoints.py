"""Checkpoint folders: written by several processes, complete only once sealed.

    checkpoints/step_00000050/   files of the learner, the intake, the launcher ...
                 complete.json   {"step": 50, "files": {relative path: bytes}}, written last

A folder without `complete.json` is what a crash left, and is never resumed from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from opd_async.errors import InputError
from opd_async.files import write_atomically

MARKER = "complete.json"
SHARDS = "learner"
"""Sub-folder of a checkpoint for Megatron's files."""
_STEP_NAME = re.compile(r"step_(\d{8,})")


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps; it need not exist."""
    return root / f"step_{step:08d}"


def seal(folder: Path, step: int) -> None:
    """Declare a checkpoint complete, once every writer has finished: all of it reaches the disk, then the marker.

    Raises `OSError` if a file cannot be synced or the marker not written; the folder then stays unsealed.
    """
    marker = folder / MARKER
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != marker)
    for path in [*files, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_atomically(marker, json.dumps({"step": step, "files": sizes}, indent=1))
    # The marker's own name, and the folder's, must survive a power cut too.
    _sync(folder)
    _sync(folder.parent)


def verify(folder: Path) -> int:
    """The step of a sealed checkpoint, after checking that each of its files has the size it was sealed with.

    Raises `InputError` that names the first missing or short file and what to do.
    """
    remedy = f"remove the folder {folder} to resume from the checkpoint before it"
    try:
        marker = json.loads((folder / MARKER).read_bytes())
        step, files = int(marker["step"]), dict(marker["files"])
    except OSError as error:
        raise InputError(f"{folder / MARKER}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{folder / MARKER}: is not a checkpoint marker; {remedy}") from None
    if folder.name != step_folder(folder.parent, step).name:
        raise InputError(f"{folder / MARKER}: was written for step {step}, not for this folder; {remedy}")
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing from the checkpoint; {remedy}")
        if path.stat().st_size != size:
            raise InputError(f"{path}: {path.stat().st_size} bytes instead of {size}, cut short or changed; {remedy}")
    return step


def shards(folder: Path, step: int | None = None) -> Path:
    """The folder with Megatron's files in `folder`: a run's, its `checkpoints`, one step of them, or Megatron's own.

    Of several steps it is that of `step`, or the newest. Sealed ones are verified, by name and size only. Raises
    `InputError` that says what `folder` lacks.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of a Megatron checkpoint")
    under = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if step is not None:
        chosen = step_folder(under, step)
        if not (chosen / MARKER).is_file():
            there = ", ".join(str(_step(sealed)) for sealed in _by_step(under, sealed=True)) or "none"
            raise InputError(f"{folder}: has no complete checkpoint at step {step}; those that it has: {there}")
    else:
        chosen = latest(under) or folder
    if (chosen / SHARDS).is_dir():
        verify(chosen)
        chosen /= SHARDS
    if not (chosen / ".metadata").is_file():
        raise InputError(
            f"{chosen}: holds no Megatron checkpoint (torch_dist); give a run's folder, its checkpoints, one step of "
            f"them, or what `python -m learner.convert hf-to-megatron` wrote"
        )
    return chosen


def latest(root: Path) -> Path | None:
    """The newest sealed checkpoint, verified; None if there is none.

    Raises `InputError` if the newest sealed one fails `verify`: going back further is the user's decision.
    """
    sealed = _by_step(root, sealed=True)
    if not sealed:
        return None
    verify(sealed[-1])
    return sealed[-1]


def prune(root: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` sealed checkpoints, and unsealed leftovers older than the newest sealed one.

    Newer unsealed folders may be in the making and stay. Returns what was removed. Raises `ValueError` if keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one checkpoint must stay")
    sealed = _by_step(root, sealed=True)
    if not sealed:
        return []
    leftovers = [folder for folder in _by_step(root, sealed=False) if _step(folder) < _step(sealed[-1])]
    removed = sealed[:-keep] + leftovers
    for folder in removed:
        # The marker goes first: a crash half-way leaves an unsealed folder, never a sealed one with files missing.
        (folder / MARKER).unlink(missing_ok=True)
        _sync(folder)
        shutil.rmtree(folder)
    return removed


def prune_exports(root: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` exports `step_0000N` under `root`, and what interrupted ones left.

    Exports appear under their names once they are whole, and leave in the same way. Returns what was removed.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one export must stay")
    if not root.is_dir():
        return []
    whole = sorted((path for path in root.iterdir() if _STEP_NAME.fullmatch(path.name) and path.is_dir()), key=_step)
    for folder in whole[:-keep]:
        folder.rename(folder.with_name(f"{folder.name}.tmp"))
    for leftover in root.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    return whole[:-keep]


def _sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _by_step(root: Path, sealed: bool) -> list[Path]:
    """Checkpoint folders that are sealed, or are not, oldest first."""
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if _STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted((path for path in folders if (path / MARKER).is_file() is sealed), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
