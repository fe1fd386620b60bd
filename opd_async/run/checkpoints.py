"""Checkpoint folders: written by several processes, complete only once sealed.

    checkpoints/step_00000050/   files of the learner, the intake, the launcher ...
                 complete.json   {"step": 50, "files": {relative path: {"bytes": n, "blake2b": checksum}},
                                 "seal": checksum of all that}, written last

A folder without `complete.json` is what a crash left, and is never resumed from. One whose files are not those that
were sealed is damaged: it is set aside, and the one before is taken.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_async.errors import InputError, RoleError
from opd_async.files import checksum, checksums, write_atomically

MARKER = "complete.json"
SHARDS = "learner"
"""Sub-folder of a checkpoint for Megatron's files."""
METADATA = ".metadata"
"""Of Megatron's files the one that says what is in the others."""
CHOSEN_ENV = "OPD_CHECKPOINT"
"""Set for roles: the name of the checkpoint that they go on from, empty for none."""
_STEP_NAME = re.compile(r"step_(\d{8,})")


def step_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps; it need not exist."""
    return root / f"step_{step:08d}"


@dataclass(frozen=True, slots=True)
class Shards:
    """What the learner's ranks have written of a checkpoint, all of them together."""

    files: int
    bytes: int

    @classmethod
    def said(cls, stats: Mapping[str, float]) -> Shards:
        """As a learner says it in its answer. Raises `RoleError` for one that does not."""
        try:
            return cls(int(stats["shard_files"]), int(stats["shard_bytes"]))
        except KeyError:
            raise RoleError("the learner does not say what it has written of a checkpoint") from None

    def stats(self) -> dict[str, float]:
        """For the answer."""
        return {"shard_files": float(self.files), "shard_bytes": float(self.bytes)}


def shards_here(folder: Path) -> Shards:
    """The learner's files in the checkpoint as this host sees it; none are whole without what says what is in them.

    A host whose folder is not the others' writes into one of its own.
    """
    shards = folder / SHARDS
    sizes = [path.stat().st_size for path in shards.glob("*.distcp")] if (shards / METADATA).is_file() else []
    return Shards(len(sizes), sum(sizes))


def seal(folder: Path, step: int) -> None:
    """Declare a checkpoint complete, once every writer has finished: all of it reaches the disk, then the marker.

    Raises `OSError` if a file cannot be synced or the marker not written; the folder then stays unsealed.
    """
    marker = folder / MARKER
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != marker)
    for path in [*files, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "blake2b": text}
        for path, text in zip(files, checksums(files), strict=True)
    }
    content = {"step": step, "files": entries}
    write_atomically(marker, json.dumps({**content, "seal": _seal_of(content)}, indent=1))
    # The marker's own name, and the folder's, must survive a power cut too.
    _sync(folder)
    _sync(folder.parent)


def _seal_of(content: Mapping[str, Any]) -> str:
    return checksum(json.dumps(content, sort_keys=True).encode()).hex()


def verify(folder: Path, thorough: bool = True) -> int:
    """The step of a sealed checkpoint, after checking that it is the one that was sealed: its marker, the size of each
    file and, if `thorough`, the checksum of each.

    Raises `InputError` that names the first file that is missing or another, and what to do.
    """
    remedy = f"remove the folder {folder} to resume from the checkpoint before it"
    marker = folder / MARKER
    try:
        content = json.loads(marker.read_bytes())
        written = content.pop("seal")
        if written != _seal_of(content):
            raise InputError(f"{marker}: is damaged, its own checksum is another; {remedy}")
        step = int(content["step"])
        files = {str(name): (int(entry["bytes"]), str(entry["blake2b"])) for name, entry in content["files"].items()}
    except OSError as error:
        raise InputError(f"{marker}: cannot be read ({error.strerror}); {remedy}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{marker}: is not a checkpoint marker; {remedy}") from None
    if folder.name != step_folder(folder.parent, step).name:
        raise InputError(f"{marker}: was written for step {step}, not for this folder; {remedy}")
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing from the checkpoint; {remedy}")
        if path.stat().st_size != size:
            raise InputError(f"{path}: {path.stat().st_size} bytes instead of {size}, cut short or changed; {remedy}")
    if thorough:
        _verify_contents(folder, {name: text for name, (_, text) in files.items()}, remedy)
    return step


def _verify_contents(folder: Path, expected: Mapping[str, str], remedy: str) -> None:
    try:
        found = checksums([folder / name for name in expected])
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); {remedy}") from None
    for (name, text), now in zip(expected.items(), found, strict=True):
        if text != now:
            raise InputError(f"{folder / name}: is damaged, its checksum is not that of the seal; {remedy}")


def shards(folder: Path, step: int | None = None, thorough: bool = False) -> Path:
    """The folder with Megatron's files in `folder`: a run's, its `checkpoints`, one step of them, or Megatron's own.

    Of several steps it is that of `step`, or the newest. Sealed ones are verified, by checksum if `thorough` (once,
    in the launcher: the ranks that read it follow). Raises `InputError` that says what `folder` lacks.
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
        sealed = _by_step(under, sealed=True)
        chosen = sealed[-1] if sealed else folder
    if (chosen / SHARDS).is_dir():
        verify(chosen, thorough)
        chosen /= SHARDS
    if not (chosen / METADATA).is_file():
        raise InputError(
            f"{chosen}: holds no Megatron checkpoint (torch_dist); give a run's folder, its checkpoints, one step of "
            f"them, or what `opd convert hf-to-megatron` wrote"
        )
    return chosen


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest sealed checkpoint that is whole, None if none was ever sealed, and newer ones that are damaged."""

    folder: Path | None
    damaged: tuple[tuple[Path, str], ...] = ()
    """Folder and what is wrong with it."""

    @property
    def environment(self) -> dict[str, str]:
        """What roles are told of it."""
        return {CHOSEN_ENV: "" if self.folder is None else self.folder.name}

    @property
    def step(self) -> int:
        """The step to go on from."""
        return 0 if self.folder is None else _step(self.folder)


NONE = Newest(None)
"""Of a run that begins."""


def newest(root: Path) -> Newest:
    """Look for a checkpoint to go on from, from the newest back; every file of it is read and verified.

    Raises `InputError`, which names every one, if there are some and all are damaged: to begin anew is the user's
    decision.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(_by_step(root, sealed=True)):
        try:
            verify(folder)
        except InputError as error:
            damaged.append((folder, str(error)))
            continue
        return Newest(folder, tuple(damaged))
    if damaged:
        raise InputError("\n".join(("every checkpoint is damaged:", *(f"  {text}" for _, text in damaged))))
    return Newest(None)


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again and it is there to be looked at."""
    aside = folder.with_name(f"{folder.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def chosen(root: Path, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The checkpoint that a role goes on from, None for a beginning: the one that the launcher has verified, so that
    all take the same; without a launcher the newest by name."""
    name = environment.get(CHOSEN_ENV)
    if name is None:
        sealed = _by_step(root, sealed=True)
        return sealed[-1] if sealed else None
    return root / name if name else None


def make_room(folder: Path, keep: int | None = None) -> Path | None:
    """Remove what is there of the unsealed checkpoint `folder`, and the oldest sealed one where `keep` says that it
    would have gone once `folder` was sealed: never the newest. Returns the sealed one that is gone, None for none.

    What cannot be removed stays.
    """
    shutil.rmtree(folder, ignore_errors=True)
    sealed = _by_step(folder.parent, sealed=True)
    if keep is None or len(sealed) < max(keep, 2):
        return None
    try:
        (sealed[0] / MARKER).unlink()
        shutil.rmtree(sealed[0])
    except OSError:
        return None
    return sealed[0]


def prune(root: Path, keep: int, spared: Path | None = None) -> list[Path]:
    """Remove all but the newest `keep` sealed checkpoints, and unsealed leftovers older than the newest sealed one.

    Newer unsealed folders may be in the making and stay, as does `spared`, which somebody reads. Returns what was
    removed. Raises `ValueError` if keep < 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one checkpoint must stay")
    sealed = _by_step(root, sealed=True)
    if not sealed:
        return []
    leftovers = [folder for folder in _by_step(root, sealed=False) if _step(folder) < _step(sealed[-1])]
    removed = [folder for folder in sealed[:-keep] + leftovers if folder != spared]
    for folder in removed:
        # The marker goes first: a crash half-way leaves an unsealed folder, never a sealed one with files missing.
        (folder / MARKER).unlink(missing_ok=True)
        _sync(folder)
        shutil.rmtree(folder)
    return removed


def prune_exports(root: Path, keep: int, spared: Path | None = None) -> list[Path]:
    """Remove all but the newest `keep` exports `step_0000N` under `root`, and what interrupted ones left; not `spared`.

    Exports appear under their names once they are whole, and leave in the same way. Returns what was removed.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one export must stay")
    if not root.is_dir():
        return []
    whole = sorted((path for path in root.iterdir() if _STEP_NAME.fullmatch(path.name) and path.is_dir()), key=_step)
    removed = [folder for folder in whole[:-keep] if folder != spared]
    for folder in removed:
        folder.rename(folder.with_name(f"{folder.name}.tmp"))
    for leftover in root.glob("step_*.tmp"):
        shutil.rmtree(leftover)
    return removed


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
