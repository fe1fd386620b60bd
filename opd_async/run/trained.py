"""What each step trained, as a file of its own: `trained.jsonl`, appended to and never read by a run.

    python -m opd_async.run.trained RUN_FOLDER      prints it: {"version": 7, "ranges": [[sample, start, end, ...]]}

One line for each step: {"version": 7, "ranges": "<base64>"}, with several teachers also "teachers". The text holds
(sample, start, end, oldest version, newest version) of each range as differences, packed by MessagePack: a third of the
same numbers as text. What was given between sampled tokens is in no range; it is listed beside them, as "given":
[[sample, start, end], ...], with the step that took it as context. A checkpoint has the file's size in `trained.json`.
Who goes back to that checkpoint cuts the file there, without reading it.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from opd_async.data.jsonl import JsonlRecord, begins_line, read_jsonl, read_jsonl_ends
from opd_async.errors import InputError
from opd_async.files import write_atomically

FILE_NAME = "trained.jsonl"
SIZE_FILE = "trained.json"
"""In a checkpoint: {"bytes": size of the file}."""
COLUMNS = 5
Ranges = npt.NDArray[np.int64]
"""(n, 5): sample, start, end, oldest and newest weight version, in the order in which the step took them."""


@dataclass(frozen=True, slots=True)
class TrainedStep:
    """What the step at weights `version` trained."""

    version: int
    ranges: Ranges
    teachers: tuple[str, ...] = ()
    """Who scored each range; empty with one teacher."""
    given: tuple[tuple[int, int, int], ...] = ()
    """(sample, start, end) of tokens that the step took as context: nobody sampled them."""


class TrainedRecord:
    """The file in a run's folder. A row that cannot be written is left out: the frontier is what a resume trusts."""

    def __init__(self, folder: Path, complain: Callable[[str], None], version: int, checkpoint: Path | None) -> None:
        """Go on at `version`, of which `checkpoint` has the file's size; without one, the file is empty or searched."""
        path = folder / FILE_NAME
        self._record = JsonlRecord(path, complain, 0 if version == 0 else _size_at(path, version, checkpoint))

    def write(
        self,
        version: int,
        ranges: Ranges,
        teachers: Sequence[str] = (),
        given: Sequence[tuple[int, int, int]] = (),
    ) -> bool:
        """Append what a step trained; `teachers` where there are several, `given` as in `TrainedStep`. Returns whether
        there was room."""
        row: dict[str, Any] = {"version": version, "ranges": _packed(version, ranges)}
        row |= {"teachers": list(teachers)} if teachers else {}
        row |= {"given": [list(one) for one in given]} if given else {}
        return self._record.write(row)

    def save(self, checkpoint: Path) -> None:
        """Note in `checkpoint`, which exists, how long the file is now; raises `OSError` if the note fails."""
        self._record.sync()
        write_atomically(checkpoint / SIZE_FILE, json.dumps({"bytes": self._record.size}))

    def close(self) -> None:
        """Close the file; it is safe to call this twice."""
        self._record.close()


def read_trained(folder: Path) -> Iterator[TrainedStep]:
    """The steps of a run's folder, in order; none without the file. `InputError` names a line that is not one."""
    path = folder / FILE_NAME
    if path.exists():
        for number, row in enumerate(read_jsonl(path), start=1):
            yield _step_of(row, f"{path}:{number}")


def _step_of(row: dict[str, Any], where: str) -> TrainedStep:
    try:
        version = int(row["version"])
        given = tuple((int(sample), int(start), int(end)) for sample, start, end in row.get("given", ()))
        return TrainedStep(version, _unpacked(version, row["ranges"]), tuple(row.get("teachers", ())), given)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{where}: not the ranges of a step ({error})") from None


def _packed(version: int, ranges: Ranges) -> str:
    """Differences are small: of samples to the one before, of ends to starts, of versions to the step's."""
    sample, start, end, oldest, newest = ranges.T
    columns = (np.diff(sample, prepend=0), start, end - start, version - newest, newest - oldest)
    return base64.b64encode(msgpack.packb(np.stack(columns, axis=1).ravel().tolist())).decode()


def _unpacked(version: int, text: str) -> Ranges:
    flat = np.array(msgpack.unpackb(base64.b64decode(text, validate=True)), np.int64)
    step, start, length, age, spread = flat.reshape(-1, COLUMNS).T
    newest = version - age
    return np.stack((np.cumsum(step), start, start + length, newest - spread, newest), axis=1)


def _size_at(path: Path, version: int, checkpoint: Path | None) -> int:
    """Bytes of the steps before `version`: as `checkpoint` says, else counted."""
    size = 0
    if checkpoint is not None:
        try:
            size = int(json.loads((checkpoint / SIZE_FILE).read_bytes())["bytes"])
        except (OSError, ValueError, TypeError, KeyError):  # a checkpoint of somebody who keeps no such file
            size = 0
    if size and begins_line(path, size):
        return size
    size = 0
    if path.exists():
        for end, row in read_jsonl_ends(path):
            if row.get("version", version) >= version:
                break
            size = end
    return size


def main() -> None:
    """Print a run's file as JSON lines that a person can read."""
    parser = argparse.ArgumentParser(description="Print what each step of a run trained.")
    parser.add_argument("folder", type=Path, help="the run's folder")
    for step in read_trained(parser.parse_args().folder):
        teachers = {"teachers": list(step.teachers)} if step.teachers else {}
        given = {"given": [list(one) for one in step.given]} if step.given else {}
        print(json.dumps({"version": step.version, "ranges": step.ranges.tolist(), **teachers, **given}))


if __name__ == "__main__":
    main()
