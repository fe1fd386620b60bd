"""Files that are either whole or absent, and their checksums."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHECKSUM_BYTES = 32
_BLOCK = 1 << 20
PRIVATE = 0o600
"""Mode of what may hold keys or prompts."""


def write_atomically(path: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Write `content` beside `path`, flush it to disk, then rename: a reader never sees half a file.

    The file has `mode` (less what the umask takes) from its first byte on. What is left beside it after an error is
    removed; the name in between is random, so that two hosts do not meet in it.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def checksum(content: bytes | memoryview) -> bytes:
    """BLAKE2b of `content`, `CHECKSUM_BYTES` long.

    In Python's own library, about 1 GB/s on a core. BLAKE3 is faster on many cores, and a dependency in C or Rust;
    here files of a checkpoint, of which there are more than cores, share the cores instead (`checksums`).
    """
    return hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest()


def checksums(paths: Collection[Path]) -> list[str]:
    """The checksum of each file as hexadecimal text, several files at once (the hash lets go of the interpreter).

    Raises `OSError` for the first that cannot be read.
    """
    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1) or 1) as pool:
        return list(pool.map(_checksum_of, paths))


def _checksum_of(path: Path) -> str:
    hasher = hashlib.blake2b(digest_size=CHECKSUM_BYTES)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()
