"""Prompts of a function of the user's (`data.function`), read one by one as they are leased.

    function() -> sequence of rows    row i is asked for when prompt i is leased; its order is `data.shuffle`'s
               -> iterator of rows    advanced to row i; when it ends, the function is called again

A row is what a line of a prompts file holds: `prompt`, `label`, `tools`, `metadata`. Both kinds go on where they
stopped when a run is resumed: an iterator is advanced to the first prompt that is needed, so it must give the same
rows again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from opd_async.config.topology import PromptsSection
from opd_async.data.prompts import Prompt, Reading, read_row
from opd_async.data.rows import RowError
from opd_async.hooks import HookError, add_working_directory, blame, load_hook

KEY = "data.function"
ENDLESS = 1 << 62
"""Length of an iterator: nobody knows where it ends."""
KEPT = 65536
"""So many of the latest rows of an iterator can be asked for again without calling the function anew."""


class OwnPrompts(Sequence[Prompt]):
    """The prompts of `module:name`, tokenized when they are asked for; not for several threads at once."""

    def __init__(self, path: str, reading: Reading, limit: int, *, labelled: bool = False) -> None:
        """Load the function and call it. `limit` is the longest prompt, tokens; `labelled`: no row goes without label.

        Raises `InputError` if it cannot be loaded, `HookError` if it raises or returns nothing that has rows.
        """
        add_working_directory()
        self._path, self._reading, self._limit = path, reading, limit
        self._labelled = labelled
        self._function: Callable[[], Any] = load_hook(KEY, path)
        found = self._called("its call")
        self._rows: Sequence[Any] | None = None
        self._cursor: _Cursor | None = None
        if isinstance(found, Sequence) or (hasattr(found, "__len__") and hasattr(found, "__getitem__")):
            self._rows = found
            if not len(found):
                raise self._wrong("returned no rows")
        elif isinstance(found, Iterable):
            self._cursor = _Cursor(iter(found), lambda: iter(self._called("its call")))
        else:
            raise self._wrong(f"returned {type(found).__name__}, not a sequence or an iterator of rows")

    def __len__(self) -> int:
        """How many rows there are; `ENDLESS` for an iterator."""
        return ENDLESS if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        """The prompt of row `index`, tokenized now. Raises `HookError` that names the row for one that is of no use."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):  # how loops over a sequence end
            raise IndexError(index)
        given = f"row {index}"
        try:
            row = self._rows[index] if self._rows is not None else self._next(index)
        except HookError:
            raise
        except Exception as error:  # the edge of the user's code
            raise blame(KEY, self._path, given, error) from error
        try:
            prompt = read_row(index, row, self._reading, self._limit)
        except RowError as error:
            raise self._wrong(f"gave {given}, which cannot be used: {error}") from None
        if self._labelled and not prompt.label:
            raise self._wrong(f"gave {given} without 'label', with which reward.kind compares responses")
        return prompt

    def _next(self, index: int) -> Any:
        assert self._cursor is not None
        found = self._cursor.row(index)
        if found is None:
            raise self._wrong("returned an iterator without rows")
        return found[0]

    def _called(self, given: str) -> Any:
        try:
            return self._function()
        except Exception as error:  # the edge of the user's code
            raise blame(KEY, self._path, given, error) from error

    def _wrong(self, what: str) -> HookError:
        return HookError(f"{KEY}: {self._path} {what}; mend the function, and go on with --resume")


SECTION = PromptsSection(path=Path())
"""The names of a row's keys; no file is read."""


class _Cursor:
    """An iterator that can be asked for the row of an index; the function is called again where it ends."""

    def __init__(self, rows: Iterator[Any], again: Callable[[], Iterator[Any]]) -> None:
        self._rows, self._again = rows, again
        self._next = 0
        self._kept: dict[int, Any] = {}

    def row(self, index: int) -> tuple[Any] | None:
        """The row; None if an iterator has none."""
        if index not in self._kept and index < self._next:
            self._rows, self._next, self._kept = self._again(), 0, {}
        while self._next <= index:
            if not self._advance():
                return None
        return (self._kept[index],)

    def _advance(self) -> bool:
        """Read one row, if need be of the iterator of another call; False if that has none."""
        row = next(self._rows, _NONE)
        if row is _NONE:
            self._rows = self._again()
            if (row := next(self._rows, _NONE)) is _NONE:
                return False
        self._kept[self._next] = row
        self._kept.pop(self._next - KEPT, None)
        self._next += 1
        return True


_NONE = object()
"""Stands for the end of an iterator, whose rows may be anything."""
