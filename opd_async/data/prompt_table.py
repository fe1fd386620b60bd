"""Prompts as columns: tokens, labels, metadata in a few flat arrays, in memory or mapped from files.

    rows -> ColumnWriter -> one file for each column (or memory) -> PromptTable -> Prompt, made when it is asked for

A million prompts as objects take gigabytes; as columns they take their tokens, their text, and 37 bytes each, and what
is mapped from files is not even the process's own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from opd_async.transport.step_batch import Int32Array

HEADER = "columns.json"
"""Written last: the bytes of every column's file. A folder without it is half of one."""
DTYPES: dict[str, np.dtype[Any]] = {
    "ids": np.dtype("<i4"),
    "id_ends": np.dtype("<i8"),
    "text": np.dtype("u1"),
    "label_ends": np.dtype("<i8"),
    "metadata_ends": np.dtype("<i8"),
    "teachers": np.dtype("u1"),
    "teacher_ids": np.dtype("<i4"),
    "teacher_id_ends": np.dtype("<i8"),
    "contrast_ids": np.dtype("<i4"),
    "contrast_id_ends": np.dtype("<i8"),
}
"""`text` has label and metadata of each prompt back to back, in UTF-8; `teachers` are indices into the names. Either
all prompts have contrast ids or none, whose columns are empty then."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: `prompt_id` is the position of its row in its files, `token_ids` int32[n], `label` "" if none."""

    prompt_id: int
    token_ids: Int32Array
    label: str
    metadata: dict[str, Any]
    teacher: str = ""
    """Who scores its responses; "" where no teacher engine does."""
    _: KW_ONLY
    teacher_ids: Int32Array | None = None
    """int32[m]: what its teacher reads in place of `token_ids`; None: the same."""
    contrast_ids: Int32Array | None = None
    """int32[c]: what its teacher reads beside that; None: nothing."""

    @property
    def metadata_json(self) -> str:
        """Write the metadata as JSON, which is what a reward gets; values that JSON cannot hold become text."""
        return json.dumps(self.metadata, default=str) if self.metadata else "{}"


class ColumnWriter:
    """Appends prompts to columns: to files of a folder, or in memory without one. `finish` makes them readable."""

    def __init__(self, folder: Path | None) -> None:
        """`folder` must exist; raises `OSError` if it cannot be written."""
        self._folder = folder
        self._files: dict[str, BinaryIO] = {
            name: io.BytesIO() if folder is None else (folder / name).open("wb") for name in DTYPES
        }
        self._ids = self._text = self._teacher_ids = self._contrast_ids = 0

    def add(
        self,
        token_ids: Sequence[int],
        label: str,
        metadata: dict[str, Any],
        teacher: int,
        teacher_ids: Sequence[int] = (),
        contrast_ids: Sequence[int] = (),
    ) -> None:
        """Append one prompt, whose teacher is the one with this index, what it reads (nothing: the prompt), and what it
        reads beside that."""
        words = label.encode("utf-8", "surrogatepass")
        more = json.dumps(metadata, default=str).encode() if metadata else b""
        self._ids += len(token_ids)
        self._files["ids"].write(np.asarray(token_ids, DTYPES["ids"]).tobytes())
        self._files["id_ends"].write(self._ids.to_bytes(8, "little"))
        self._files["text"].write(words + more)
        self._files["label_ends"].write((self._text + len(words)).to_bytes(8, "little"))
        self._text += len(words) + len(more)
        self._files["metadata_ends"].write(self._text.to_bytes(8, "little"))
        self._files["teachers"].write(bytes((teacher,)))
        self._teacher_ids += len(teacher_ids)
        self._files["teacher_ids"].write(np.asarray(teacher_ids, DTYPES["teacher_ids"]).tobytes())
        self._files["teacher_id_ends"].write(self._teacher_ids.to_bytes(8, "little"))
        if contrast_ids:
            self._contrast_ids += len(contrast_ids)
            self._files["contrast_ids"].write(np.asarray(contrast_ids, DTYPES["contrast_ids"]).tobytes())
            self._files["contrast_id_ends"].write(self._contrast_ids.to_bytes(8, "little"))

    def finish(self) -> Columns:
        """Close the columns and return them."""
        if self._folder is None:
            arrays = {
                name: np.frombuffer(file.getvalue(), DTYPES[name])
                for name, file in self._files.items()
                if isinstance(file, io.BytesIO)
            }
            return Columns(arrays)
        sizes = {name: file.tell() for name, file in self._files.items()}
        self.close()
        (self._folder / HEADER).write_text(json.dumps(sizes))
        return Columns.mapped(self._folder)

    def close(self) -> None:
        """Close the files; they are of no use without `finish`."""
        for file in self._files.values():
            file.close()


class Columns:
    """The columns of a prompts file, all its rows."""

    def __init__(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        self._arrays = arrays

    @classmethod
    def mapped(cls, folder: Path) -> Columns:
        """Map the files of a folder into memory. Raises `OSError` or `ValueError` if it does not hold all of them."""
        sizes = json.loads((folder / HEADER).read_bytes())
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, dtype in DTYPES.items():
            path = folder / name
            if path.stat().st_size != sizes[name]:
                raise ValueError(f"{path}: {path.stat().st_size} bytes instead of {sizes[name]}")
            arrays[name] = np.memmap(path, dtype, "r") if sizes[name] else np.zeros(0, dtype)
        return cls(arrays)

    def __len__(self) -> int:
        return len(self._arrays["id_ends"])

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each prompt, int64[n]."""
        return np.diff(self._arrays["id_ends"], prepend=0)

    def teacher_lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each teacher's own prompt, int64[n]; 0 where it reads the student's."""
        return np.diff(self._arrays["teacher_id_ends"], prepend=0)

    def contrast_lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of what each teacher reads beside its prompt, int64[n], or int64[0] where there is none."""
        return np.diff(self._arrays["contrast_id_ends"], prepend=0)

    def teachers(self) -> npt.NDArray[np.uint8]:
        """Return which teacher each prompt has, uint8[n]."""
        return np.asarray(self._arrays["teachers"])

    def unlabelled(self) -> npt.NDArray[np.bool_]:
        """Tell which prompts have no label, bool[n]."""
        ends = self._arrays["metadata_ends"]
        begins = np.concatenate((np.zeros(1, np.int64), ends[:-1])) if len(ends) else ends
        return np.asarray(self._arrays["label_ends"] == begins)

    def prompt(self, row: int, names: Sequence[str]) -> Prompt:
        """Make the prompt of a row; its teacher is one of `names`."""
        arrays = self._arrays
        first, text = (0, 0) if row == 0 else (int(arrays["id_ends"][row - 1]), int(arrays["metadata_ends"][row - 1]))
        middle, end = int(arrays["label_ends"][row]), int(arrays["metadata_ends"][row])
        metadata = arrays["text"][middle:end].tobytes()
        return Prompt(
            row,
            np.array(arrays["ids"][first : int(arrays["id_ends"][row])], np.int32),
            arrays["text"][text:middle].tobytes().decode("utf-8", "surrogatepass"),
            json.loads(metadata) if metadata else {},
            names[int(arrays["teachers"][row])],
            teacher_ids=self._of_teacher("teacher", row),
            contrast_ids=self._of_teacher("contrast", row) if len(arrays["contrast_id_ends"]) else None,
        )

    def _of_teacher(self, column: str, row: int) -> Int32Array | None:
        """What the teacher of a row reads, by one of the two pairs of columns; None for nothing."""
        ends = self._arrays[f"{column}_id_ends"]
        begin, end = 0 if row == 0 else int(ends[row - 1]), int(ends[row])
        return np.array(self._arrays[f"{column}_ids"][begin:end], np.int32) if end > begin else None


class PromptTable(Sequence[Prompt]):
    """The prompts of a file that are short enough, in its order; each is made anew when it is asked for."""

    def __init__(self, columns: Columns, names: tuple[str, ...], limit: int) -> None:
        """Leave out what has more than `limit` tokens."""
        self._columns, self._names = columns, names
        short = columns.lengths() <= limit
        self._rows = None if short.all() else np.flatnonzero(short).astype(np.int32)

    def __len__(self) -> int:
        return len(self._columns) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        return self._columns.prompt(position if self._rows is None else int(self._rows[position]), self._names)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each prompt, int64[n], without making one."""
        found = self._columns.lengths()
        return found if self._rows is None else found[self._rows]

    def unlabelled(self) -> int:
        """Count the prompts that have no label."""
        found = self._columns.unlabelled()
        return int(found.sum() if self._rows is None else found[self._rows].sum())
