"""Rows of data files: JSONL, JSONL in gzip, or parquet; one file, several, a folder, or a pattern.

    data.*.path -> files, in order -> rows with their places in words, one after the other

A folder's and a pattern's files come by name, character for character; those of a list in its order.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opd_async.errors import InputError
from opd_async.extras import need

JSONL = (".jsonl", ".jsonl.gz")
PARQUET = ".parquet"
SUFFIXES = (*JSONL, PARQUET)
BATCH = 4096
"""Rows of a parquet file that are read at once."""
_NAMED = 3
"""So many paths of a list are written out in messages."""

Where = Path | Sequence[Path]
"""A file, a folder, a pattern such as `data/train-*.parquet`, or several of these."""


class RowError(ValueError):
    """Says why one row cannot be used; whoever reads it adds where the row is."""


class Row(NamedTuple):
    """One row of a file."""

    where: str
    """File and line, or file and number, in words."""
    value: Any
    """What the row holds; a `RowError` where that cannot be read."""
    table: bool
    """The row is of a table, which gives every object the keys of all objects in its column, filled with null."""


def data_files(where: Where) -> list[Path]:
    """List the files that `where` stands for, in the order in which they are read.

    Raises `InputError` where there are none, where one is of another kind than the others or is no data file, and for
    a file that is there twice.
    """
    try:
        found = [file for path in ([where] if isinstance(where, Path) else where) for file in _files(path)]
        _check(found)
    except OSError as error:
        raise InputError(f"{named(where)}: cannot be read: {error.strerror or error}") from None
    return found


def named(where: Where) -> str:
    """Write `where` for messages."""
    if isinstance(where, Path):
        return str(where)
    more = len(where) - _NAMED
    return ", ".join(map(str, where[:_NAMED])) + (f" and {more} more" if more > 0 else "")


def _files(path: Path) -> list[Path]:
    """The files of one path. Raises `InputError` where there are none, `OSError` where nobody may look."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if _is_data(file) and not file.name.startswith("."))
        if not found:
            raise InputError(f"{path}: a folder without {_kinds()} files; write the path of a file, or a pattern")
    elif path.is_file():
        found = [path]
    elif has_magic(str(path)):
        names = glob(str(path), recursive=True)  # noqa: PTH207  (Path.glob takes no absolute pattern)
        found = sorted(Path(name) for name in names if Path(name).is_file())
        if not found:
            raise InputError(f"{path}: no file has a name like this; write the path of a file, or another pattern")
    else:
        raise InputError(f"no file {path}; write the path of a {_kinds()} file, a folder or a pattern")
    return found


def _check(files: list[Path]) -> None:
    """Raise `InputError` for files that cannot be read as one file."""
    for file in files:
        if not _is_data(file):
            raise InputError(f"{file} is none of {_kinds()}; write one of these")
    first, tables = files[0], [file for file in files if file.suffix == PARQUET]
    if tables and len(tables) < len(files):
        other = next(file for file in files if (file.suffix == PARQUET) != (first.suffix == PARQUET))
        raise InputError(f"{first} and {other} are of two kinds, perhaps the same rows twice; write files of one kind")
    seen: dict[Path, Path] = {}
    for file in files:
        plain = file.resolve()
        before = seen.setdefault(plain.with_suffix("") if plain.suffix == ".gz" else plain, file)
        if before is not file:
            same = f"{file}, twice" if str(before) == str(file) else f"{before} and {file}, the same file twice"
            raise InputError(f"{same}; its rows would count twice, so name it once")


def _is_data(file: Path) -> bool:
    return file.name.endswith(SUFFIXES)


def _kinds() -> str:
    return ", ".join(SUFFIXES)


def read_rows(where: Where) -> Iterator[Row]:
    """Read the rows of all files. Blank lines of a JSONL file are no rows.

    Raises `InputError` for a file that is missing or broken as a whole.
    """
    for file in data_files(where):
        try:
            yield from _read_parquet(file) if file.suffix == PARQUET else _read_jsonl(file)
        except (OSError, EOFError, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise InputError(f"{file}: cannot be read: {reason}") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            # Some editors put a byte order mark in front of the first line.
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            value: Any
            try:
                value = json.loads(text.rstrip())
            except json.JSONDecodeError as error:
                value = RowError(f"not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                value = RowError(f"not valid JSON: {error}")
            yield Row(f"{path}:{number}", value, False)


def _read_parquet(path: Path) -> Iterator[Row]:
    # Imported here: slow to import, and JSONL users do not need it.
    pyarrow = need("pyarrow", "parquet", f"{path}: a parquet file")
    parquet = need("pyarrow.parquet", "parquet", f"{path}: a parquet file")
    try:
        with parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(BATCH):
                for value in batch.to_pylist():
                    yield Row(f"{path}: row {row}", value, True)
                    row += 1
    except (pyarrow.ArrowException, ValueError) as error:
        raise InputError(f"{path}: not a parquet file: {error}") from None


def plain(value: Any) -> Any:
    """Return a value as JSON has it: numpy's arrays and numbers, and tuples, as lists and numbers."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist()) if isinstance(value, np.ndarray) else value.item()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def without_nulls(value: Any) -> Any:
    """Leave out every key of an object whose value is null, at any depth."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def find(row: Mapping[str, Any], key: str) -> Iterable[Any]:
    """Return the value under `key` as the only item; nothing where there is none.

    A key with dots that is no key of the row leads into objects, also those written as JSON text:
    `reward_model.ground_truth`. A key of the row that has dots itself comes first.
    """
    if key in row:
        return (row[key],)
    at = key.rfind(".")
    while at > 0:
        if key[:at] in row:
            inner = from_json(row[key[:at]])
            if isinstance(inner, dict) and (found := tuple(find(inner, key[at + 1 :]))):
                return found
        at = key.rfind(".", 0, at)
    return ()


def lookup(row: Mapping[str, Any], key: str | None) -> Any:
    """Return the value under `key`, as `find` does; None where there is none."""
    return None if key is None else next(iter(find(row, key)), None)


def from_json(value: Any) -> Any:
    """Return the object or list that a text holds as JSON; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
