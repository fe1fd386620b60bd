"""Models in GGUF files: made into Hugging Face folders once, and kept in the user's cache.

    models.student.path: model.gguf -> opd convert gguf-to-hf -> ~/.cache/opd_async/gguf/<name>-<key>/

The key is of the file's path, size and time of change, so that another file of the same name is another model. The
cache is below `XDG_CACHE_HOME`; a folder in it may be removed at any time between runs.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from opd_async.data.prompt_cache import user_cache
from opd_async.errors import InputError

CONVERT_S = 3600.0
"""Deadline of one conversion; a model of 8 billion weights takes minutes."""


def is_gguf(path: Path) -> bool:
    """Tell whether a path names a GGUF file that is there."""
    return path.suffix == ".gguf" and path.is_file()


def cached_folder(file: Path) -> Path:
    """Where the folder of `file`, as it is now, is kept; it need not be there yet."""
    stat = file.stat()
    text = f"{file.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    return user_cache() / "gguf" / f"{file.stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def folder_of(file: Path) -> Path:
    """Make the folder of a GGUF file, or find it in the cache. Raises `InputError` that says why it cannot be made."""
    folder = cached_folder(file)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # each in a folder of its own, so that two launches may convert one file at the same time
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    try:
        _convert(file, made)
        with suppress(OSError):  # another launch may have made it meanwhile, of the same bytes
            made.rename(folder)
    finally:
        for left in (made, made.with_name(f"{made.name}.tmp")):
            shutil.rmtree(left, ignore_errors=True)
    if not folder.is_dir():
        raise InputError(f"{file}: its folder {folder} cannot be put in place; see who may write into {folder.parent}")
    return folder


def _convert(file: Path, out: Path) -> None:
    """Convert in a process of its own: whoever asks need not load torch, and the model's memory is given back."""
    command = [sys.executable, "-m", "opd_async.learner.convert", "gguf-to-hf", "--gguf", str(file), "--out"]
    try:
        done = subprocess.run([*command, str(out)], capture_output=True, text=True, timeout=CONVERT_S, check=False)
    except subprocess.TimeoutExpired:
        by_hand = " ".join([*command, str(cached_folder(file))])
        raise InputError(f"{file}: not converted within {CONVERT_S:.0f} s; convert it by hand: {by_hand}") from None
    if done.returncode:
        raise InputError((done.stderr.strip() or f"exit code {done.returncode} without a word").splitlines()[-1])
