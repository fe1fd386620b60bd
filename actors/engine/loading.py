"""The edge to transformers: what it raises over a folder becomes one error that names the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd_async.errors import InputError


@contextmanager
def loading(path: Path, what: str) -> Iterator[None]:
    """Raise `InputError` for whatever transformers raises inside while it loads the `what` in `path`.

    A file with unexpected content ends in any exception of its many parts.
    """
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise InputError(
            f"{path}: transformers cannot load this {what} ({type(error).__name__}: {lines[0]}); "
            "copy the folder again, or give one that the installed transformers can load"
        ) from error
