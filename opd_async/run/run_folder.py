"""The folder of a run: one launch at a time, its topology and plan saved before anything starts.

    prepare: lock -> refuse, resume or empty the folder -> topology.yaml, plan.json

The lock is held as long as the launching process lives, and ends with it whatever its end.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from opd_async.config.resuming import may_change
from opd_async.config.topology import Topology
from opd_async.config.topology_file import dump_topology, load_topology
from opd_async.errors import InputError
from opd_async.files import write_atomically
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import PLAN_FILE

TOPOLOGY_FILE = "topology.yaml"
LOCK_FILE = ".lock"
MADE_BY_RUNS = (
    TOPOLOGY_FILE,
    PLAN_FILE,
    "metrics.jsonl",
    "trained.jsonl",
    "report.json",
    "learning_curve.png",
    "targets.json",
    "checkpoints",
    "export",
    "logs",
)
"""Files and folders that a run writes into its folder: the only ones that `--overwrite` removes."""


class RunFolder:
    """A run folder held by this process; a context manager that lets go of it. The files stay."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    def release(self) -> None:
        """Let another launch use the folder; a second call does nothing."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def prepare(plan: Plan, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Take the run folder of `plan` for this process and save `topology.yaml` and `plan.json` in it.

    A folder that holds a run is refused unless `resume` (the saved topology must be equal but for
    `config.resuming.MAY_CHANGE`) or
    `overwrite` (removes what is listed in `MADE_BY_RUNS` and nothing else). Raises `InputError` for that, when another
    launch holds the folder, and when it cannot be written.
    """
    path = plan.run_folder
    if resume and overwrite:
        raise InputError("--resume and --overwrite contradict each other; give one of them")
    if resume and not holds_run(path):
        raise InputError(f"{path}: no run to resume; start it without --resume")
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder = RunFolder(path, _take_lock(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be used as a run folder: {error.strerror}") from None
    try:
        _settle_old_run(path, plan.topology, resume, overwrite)
        for name, text in (
            (TOPOLOGY_FILE, dump_topology(plan.topology)),
            (PLAN_FILE, plan.model_dump_json(indent=1)),
        ):
            write_atomically(path / name, text)
            (path / name).chmod(0o600)  # both hold the engines' keys
    except OSError as error:
        folder.release()
        raise InputError(f"{path}: cannot be written: {error}") from None
    except InputError:
        folder.release()
        raise
    return folder


def holds_run(path: Path) -> bool:
    """Does the folder hold files of a run?"""
    return any((path / name).exists() for name in MADE_BY_RUNS)


def _take_lock(path: Path) -> int:
    """A descriptor with the exclusive lock on the folder; the kernel frees it when the process ends."""
    descriptor = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        who = f"process {holder}" if holder else "another process"
        raise InputError(f"{path}: {who} is running in this folder; wait for its end, or choose another name") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _settle_old_run(path: Path, topology: Topology, resume: bool, overwrite: bool) -> None:
    """Refuse, check or remove the run that the folder holds."""
    if not holds_run(path):
        return
    if overwrite:
        for name in MADE_BY_RUNS:
            _remove(path / name)
    elif resume:
        saved = load_topology(path / TOPOLOGY_FILE)
        if changed := _changes(saved, topology):
            lines = "\n".join(f"  {line}" for line in changed)
            raise InputError(
                f"{path}: cannot be resumed with another topology; set these back, or choose another name:\n{lines}"
            )
    else:
        raise InputError(
            f"{path}: holds a run already; --resume goes on with it, --overwrite removes it, or choose another name"
        )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _changes(saved: Topology, now: Topology) -> list[str]:
    """`path: was X, now Y` for every key that differs and may not; keys that are secrets are named without values."""
    old, new = _flat(saved.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    differ = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    refused = [key for key in differ if not may_change(key)]
    return [
        f"{key}: changed" if key.endswith("api_key") else f"{key}: was {old.get(key)}, now {new.get(key)}"
        for key in refused
    ]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
