"""The folder of a run: one launch at a time, its topology and plan saved before anything starts.

    prepare: lock -> refuse, resume or empty the folder -> topology.yaml, plan.json, inputs.json

The lock is held as long as the launching process lives, and ends with it whatever its end.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from opd_async.config.evaluating import SETS
from opd_async.config.resuming import Change, content_of, may_change
from opd_async.config.topology import Topology
from opd_async.config.topology_file import dump_topology, load_topology
from opd_async.errors import InputError
from opd_async.files import PRIVATE, storing, write_atomically
from opd_async.plan.plan import COUNTERS_FOLDER, Plan
from opd_async.plan.resolve import KEYS_FOLDER, PLAN_FILE
from opd_async.run import checkpoints, fingerprints
from opd_async.run.leaving import FOLDER as DRAIN_FOLDER
from opd_async.telemetry.samples import SAMPLES_FILE
from opd_async.telemetry.samples_page import PAGE_FILE
from opd_async.telemetry.trace import TRACE_FOLDER
from opd_async.telemetry.trace_file import TRACE_FILE
from opd_async.telemetry.trackers import FOLDER as TRACKING_FOLDER

TOPOLOGY_FILE = "topology.yaml"
LOCK_FILE = ".lock"
MADE_BY_RUNS = (
    TOPOLOGY_FILE,
    PLAN_FILE,
    "metrics.jsonl",
    "trained.jsonl",
    "report.json",
    "learning_curve.png",
    SAMPLES_FILE,
    PAGE_FILE,
    TRACE_FOLDER,
    TRACE_FILE,
    "targets.json",
    COUNTERS_FOLDER,
    fingerprints.INPUTS_FILE,
    "checkpoints",
    "export",
    "logs",
    TRACKING_FOLDER,
    KEYS_FOLDER,
    DRAIN_FOLDER,
)
"""Files and folders that a run writes into its folder: the only ones that `--overwrite` removes."""


class RunFolder:
    """A run folder held by this process; a context manager that lets go of it. The files stay."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.checkpoint = checkpoints.NONE
        """The checkpoint to go on from, verified."""
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


def prepare(
    plan: Plan,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Mapping[str, str] | None = None,
    change_lr: bool = False,
) -> RunFolder:
    """Take the run folder of `plan` for this process and save `topology.yaml`, `plan.json`, `inputs.json` in it.

    `inputs` are the fingerprints of what the run reads. A folder that holds a run is refused unless `resume` (the saved
    topology must be equal but for what `may_change`, the inputs altogether) or `overwrite` (removes what is listed in
    `MADE_BY_RUNS` and nothing else). Raises `InputError` for that, when another launch holds the folder, and when it
    cannot be written.
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
        if resume:
            folder.checkpoint = checkpoints.newest(path / "checkpoints")  # nothing is written where none can be used
        before = Inputs(fingerprints.read(path) if resume else {}, dict(inputs or {}))
        _settle_old_run(path, plan.topology, resume, overwrite, before, change_lr)
        files = {TOPOLOGY_FILE: dump_topology(plan.topology), PLAN_FILE: plan.model_dump_json(indent=1)}
        if known := before.now or before.saved:
            files[fingerprints.INPUTS_FILE] = json.dumps(known, indent=1)
        for name, text in files.items():
            write_atomically(path / name, text, PRIVATE)  # they hold keys that the topology gives
    except OSError as error:
        folder.release()
        raise InputError(f"{path}: cannot be written: {error}") from None
    except InputError:
        folder.release()
        raise
    return folder


def change_plan(plan: Plan, change: Callable[[Plan], Plan]) -> Plan:
    """Make a change to the plan of a run, in its folder too, where whoever starts from now on reads it.

    The saved one has none of the keys that were drawn, so it is changed by itself. Raises `StorageError`.
    """
    file = plan.run_folder / PLAN_FILE
    with storing(file):
        saved = change(Plan.model_validate_json(file.read_text(encoding="utf-8")))
        write_atomically(file, saved.model_dump_json(indent=1), PRIVATE)
    return change(plan)


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


@dataclass(frozen=True, slots=True)
class Inputs:
    """Fingerprints of what a run reads: as it began, and as it is now. Empty where nobody has computed them."""

    saved: dict[str, str]
    now: dict[str, str]

    def same(self, section: str) -> bool:
        """Is the content known to be the same? There is none to compare of an evaluation set that came or went."""
        if section.startswith(f"{SETS}.") and not (section in self.saved and section in self.now):
            return bool(self.now)
        return section in self.saved and self.saved[section] == self.now.get(section)


def _settle_old_run(
    path: Path, topology: Topology, resume: bool, overwrite: bool, inputs: Inputs, change_lr: bool
) -> None:
    """Refuse, check or remove the run that the folder holds."""
    if not holds_run(path):
        return
    if overwrite:
        for name in MADE_BY_RUNS:
            _remove(path / name)
    elif resume:
        saved = load_topology(path / TOPOLOGY_FILE)
        if changed := _changes(saved, topology, inputs, change_lr):
            lines = "\n".join(f"  {line}" for line in changed)
            raise InputError(
                f"{path}: cannot be resumed with another topology; set these back, or choose another name:\n{lines}"
            )
        if inputs.now and (others := fingerprints.differences(inputs.saved, inputs.now)):
            lines = "\n".join(f"  {_named(section, topology)}" for section in others)
            raise InputError(
                f"{path}: cannot be resumed, the run began with other content in these; bring it back, or choose "
                f"another name:\n{lines}"
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


def _changes(saved: Topology, now: Topology, inputs: Inputs, change_lr: bool) -> list[str]:
    """`path: was X, now Y` for every key that differs and may not; keys that are secrets are named without values."""
    old, new = _flat(saved.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    differ = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
    return [
        f"{key}: was {old.get(key)}, now {new.get(key)}{hint}"
        for key in differ
        if (hint := _refusal(key, inputs, change_lr)) is not None
    ]


def _refusal(key: str, inputs: Inputs, change_lr: bool) -> str | None:
    """None if another value of this key is all right here, else what to add to the message."""
    change, section = may_change(key), content_of(key)
    if change is Change.WITH_FLAG:
        return None if change_lr else "; --change-lr allows it"
    if change is Change.SAME_CONTENT and section is not None and inputs.same(section):
        return None
    return None if change is Change.YES else ""


def _named(section: str, topology: Topology) -> str:
    """`data.train: <path>` of a section of the fingerprints."""
    values = _flat(topology.model_dump(mode="json"))
    return f"{section}: {values.get(f'{section}.path')}"


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
