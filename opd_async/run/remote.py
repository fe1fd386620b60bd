"""One transfer between a run's folder and a store that fsspec knows, in a process of its own: a store's client may
hang, and starts threads that outlive it.

    python -m opd_async.run.remote probe URL               can it be written to?
    python -m opd_async.run.remote claim URL               is it free of checkpoints?
    python -m opd_async.run.remote put RUN URL CHECKPOINT KEEP
    python -m opd_async.run.remote export RUN URL FOLDER
    python -m opd_async.run.remote get URL RUN             the newest checkpoint, into a folder that is not there yet

    URL/topology.yaml, inputs.json, metrics.jsonl, trained.jsonl     what a resume reads, without API keys
        checkpoints/step_00000050/...   complete.json last: what has none is what an upload left that was cut off
        export/...                      config.json last

The last line of an error says what is wrong; the exit code is then 1.
"""

from __future__ import annotations

import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import yaml

from opd_async.errors import InputError, OpdError
from opd_async.run import checkpoints
from opd_async.run.fingerprints import INPUTS_FILE
from opd_async.run.run_folder import TOPOLOGY_FILE
from opd_async.run.trained import FILE_NAME as TRAINED_FILE
from opd_async.telemetry.report import METRICS_FILE

RECORDS = (INPUTS_FILE, METRICS_FILE, TRAINED_FILE)
"""What goes with a checkpoint as it is, beside the topology."""
CHECKPOINTS = "checkpoints"
CONFIG = "config.json"


class Store:
    """A folder of a store. Everything raises what the store's client raises."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._system, self._root = fsspec.core.url_to_fs(self.url)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def probe(self) -> None:
        """Write a small file, read it, remove it."""
        name, content = self._at(f".probe-{secrets.token_hex(8)}"), secrets.token_bytes(32)
        self._system.makedirs(self._root, exist_ok=True)
        self._system.pipe_file(name, content)
        try:
            if self._system.cat_file(name) != content:
                raise InputError("a file that was written there reads as another")
        finally:
            self._system.rm_file(name)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        self._system.makedirs(self._parent(name), exist_ok=True)
        self._system.pipe_file(self._at(name), content)

    def put(self, path: Path, name: str) -> None:
        """Send a file, and ask for its size there. `OpdError` if that is another."""
        size = path.stat().st_size
        self._system.makedirs(self._parent(name), exist_ok=True)
        self._system.put_file(str(path), self._at(name))
        self._system.invalidate_cache()
        there = self._system.size(self._at(name))
        if there != size and path.stat().st_size == size:
            raise OpdError(f"{name} has {there} bytes there instead of {size}")

    def _parent(self, name: str) -> str:
        return self._at(name).rpartition("/")[0]

    def put_folder(self, folder: Path, name: str, last: str) -> None:
        """Send a folder, its file `last` behind all others."""
        if self._system.exists(self._at(f"{name}/{last}")):  # what is replaced is not whole in between
            self._system.rm_file(self._at(f"{name}/{last}"))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path == folder / last):
            self.put(path, f"{name}/{path.relative_to(folder).as_posix()}")

    def steps(self) -> list[str]:
        """Names of the whole checkpoints, oldest first."""
        self._system.invalidate_cache()
        found = self._system.glob(self._at(f"{CHECKPOINTS}/step_*/{checkpoints.MARKER}"))
        return sorted((name.rsplit("/", 2)[-2] for name in found), key=lambda name: int(name.removeprefix("step_")))

    def cut_off(self) -> list[str]:
        """Names of the checkpoints of which only a part is there."""
        there = {name.rstrip("/").rsplit("/", 1)[-1] for name in self._system.glob(self._at(f"{CHECKPOINTS}/step_*"))}
        return sorted(there - set(self.steps()))

    def remove(self, step: str) -> None:
        """Remove a checkpoint, its marker first."""
        marker = self._at(f"{CHECKPOINTS}/{step}/{checkpoints.MARKER}")
        if self._system.exists(marker):
            self._system.rm_file(marker)
        self._system.rm(self._at(f"{CHECKPOINTS}/{step}"), recursive=True)

    def get(self, name: str, path: Path) -> None:
        """Fetch a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._system.get_file(self._at(name), str(path))

    def get_folder(self, name: str, folder: Path) -> None:
        """Fetch a folder."""
        under = self._at(name)
        for found in self._system.find(under):
            self.get(f"{name}/{found[len(under) :].lstrip('/')}", folder / found[len(under) :].lstrip("/"))

    def has(self, name: str) -> bool:
        """Is there such a file?"""
        return bool(self._system.exists(self._at(name)))


def put_checkpoint(run: Path, store: Store, step: str, keep: int) -> None:
    """Send what a resume needs, then the checkpoint; remove those beyond the newest `keep`, and what copies left that
    were cut off: a run has one under way at a time."""
    store.write(TOPOLOGY_FILE, without_keys((run / TOPOLOGY_FILE).read_text(encoding="utf-8")).encode())
    for name in RECORDS:
        if (run / name).is_file():
            store.put(run / name, name)
    store.put_folder(run / CHECKPOINTS / step, f"{CHECKPOINTS}/{step}", checkpoints.MARKER)
    there = store.steps()
    mine = there.index(step) + 1
    beyond = (*there[mine:], *there[: max(mine - keep, 0)])  # behind it lies what the run has gone back from
    for other in (*beyond, *store.cut_off()):
        store.remove(other)


def get_newest(store: Store, run: Path) -> str:
    """Fetch the newest checkpoint into the folder `run`, which is not there yet and appears whole. Returns its name."""
    steps = store.steps()
    if not steps:
        raise InputError("no whole checkpoint is there")
    run.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{run.name}.", dir=run.parent))
    try:
        for name in (TOPOLOGY_FILE, *RECORDS):
            if store.has(name):
                store.get(name, fresh / name)
        store.get_folder(f"{CHECKPOINTS}/{steps[-1]}", fresh / CHECKPOINTS / steps[-1])
        fresh.rename(run)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return steps[-1]


def without_keys(text: str) -> str:
    """A topology's YAML without the API keys in it."""
    return yaml.safe_dump(_without_keys(yaml.safe_load(text)), sort_keys=False, allow_unicode=True, width=120)


def _without_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: None if str(key).endswith("api_key") else _without_keys(one) for key, one in value.items()}
    return [_without_keys(one) for one in value] if isinstance(value, list) else value


def carry_out(words: Sequence[str]) -> str:
    """Do what a command line says; returns what to print. Raises what the store's client raises."""
    what, *rest = words
    match what, rest:
        case "probe", [url]:
            Store(url).probe()
        case "put", [run, url, step, keep]:
            put_checkpoint(Path(run), Store(url), step, int(keep))
        case "export", [run, url, name]:
            Store(url).put_folder(Path(run) / name, name, CONFIG)
        case "claim", [url]:
            if steps := Store(url).steps():
                raise InputError(f"holds {steps[-1]} of a run already")
        case "get", [url, run]:
            return get_newest(Store(url), Path(run))
        case _:
            raise InputError(f"not a transfer: {' '.join(words)}")
    return ""


def main() -> None:
    """Carry out one transfer; ends the process with 0, or with 1 behind a line that says what is wrong."""
    try:
        print(carry_out(sys.argv[1:]))
    except Exception as error:  # of any client of any store
        kind = "" if isinstance(error, OpdError) else f"{type(error).__name__}: "
        sys.exit(" ".join(f"{kind}{error}".split()))


if __name__ == "__main__":
    main()
