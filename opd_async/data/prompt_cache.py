"""Prompts that were tokenized before, found again by content: of the files, the tokenizer, and this package's reading.

    ~/.cache/opd_async/prompts/<key>/   the columns of a section's files (`prompt_table.py`); $XDG_CACHE_HOME where set

A small file is read anew each time. What cannot be written here is kept in memory; what is damaged is made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from opd_async.data.prompt_table import Columns, ColumnWriter

SMALL_BYTES = 4 << 20
"""Files below this size, together, are read within a second."""
MOST_FILES = 16
"""So many sections' prompts are kept; those that were not used for longest go."""
_BLOCK = 1 << 20


def user_cache() -> Path:
    """Return this package's folder in the user's cache; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "opd_async"


def cache_folder() -> Path:
    """Return where tokenized prompts are kept; it need not exist."""
    return user_cache() / "prompts"


def columns_of(files: Sequence[Path], words: Sequence[str], fill: Callable[[ColumnWriter], None]) -> Columns:
    """Return the columns of prompts files: those that are kept, or new ones, which `fill` writes.

    `words` are everything beside the files' content that decides what `fill` writes. Raises `OSError` if a file
    cannot be read, and what `fill` raises; nothing is kept then.
    """
    if sum(file.stat().st_size for file in files) < SMALL_BYTES:
        return _filled(ColumnWriter(None), fill)
    root = cache_folder()
    kept = root / _key(files, words)
    try:
        found = Columns.mapped(kept)
        os.utime(kept)
        return found
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(kept, ignore_errors=True)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are the owner's affair
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
        writer = ColumnWriter(fresh)
    except OSError:
        return _filled(ColumnWriter(None), fill)
    try:
        return _keep(fresh, kept, writer, fill)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _keep(fresh: Path, kept: Path, writer: ColumnWriter, fill: Callable[[ColumnWriter], None]) -> Columns:
    """Fill columns in a new folder and give it its name; in memory where the disk is full."""
    try:
        _filled(writer, fill)
        with suppress(OSError):  # another process was quicker
            fresh.rename(kept)
        _forget_old(kept.parent)
        return Columns.mapped(kept)
    except OSError:
        return _filled(ColumnWriter(None), fill)


def _filled(writer: ColumnWriter, fill: Callable[[ColumnWriter], None]) -> Columns:
    try:
        fill(writer)
        return writer.finish()
    finally:
        writer.close()


def _key(files: Sequence[Path], words: Sequence[str]) -> str:
    """Digest everything that the columns depend on, this package's own modules among it."""
    digest = hashlib.blake2b(digest_size=16)
    for word in words:
        digest.update(len(word).to_bytes(8, "little") + word.encode("utf-8", "surrogatepass"))
    for file in (*sorted(Path(__file__).parent.glob("*.py")), *files):
        digest.update(f"{file.suffix} {file.stat().st_size} ".encode())
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _forget_old(root: Path) -> None:
    """Remove what was not used for longest, beyond `MOST_FILES`. A run that has mapped it keeps it."""
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for folder in folders[:-MOST_FILES]:
        shutil.rmtree(folder, ignore_errors=True)
