"""Files that are either whole or absent, their checksums, and words for a disk that does not take them."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from opd_async.errors import StorageError

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


REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or have the quota raised",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "make that file system writable again (a disk that fails is often mounted read-only: see dmesg)",
    errno.EACCES: "give its folder back to the user of the run",
    errno.EPERM: "give its folder back to the user of the run",
    errno.EIO: "see dmesg: the disk fails",
}
"""What to do where a file cannot be written."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors that only a disk gives, whatever was being done."""


def unwritten(path: Path, error: OSError) -> str:
    """In words: what cannot be written, why, and what to do. The file that `error` names stands for `path`."""
    named = (error.filename2, error.filename)  # of a copy, the second is what was to be written
    where = next((name for name in named if isinstance(name, str)), path)
    remedy = REMEDIES.get(error.errno or 0, "see to that disk")
    return f"{where} cannot be written: {error.strerror or error}; {remedy}"


def storage_failure(error: BaseException) -> OSError | None:
    """The `OSError` of a disk behind an error, however libraries have wrapped it; None where there is none."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        if isinstance(one, OSError) and one.errno in REMEDIES:
            return one
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
        failures = getattr(one, "failures", None)  # torch.distributed.checkpoint: by rank (error, traceback)
        if isinstance(failures, dict):
            waiting += [found[0] for found in failures.values() if isinstance(found, tuple)]
    return None


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Raise `StorageError` with the right words where `path`, or something in it, cannot be written."""
    try:
        yield
    except OSError as error:
        raise StorageError(unwritten(path, error)) from error


def reserve(folder: Path, size: int) -> None:
    """Make sure that `folder`, which exists, can be written into and has `size` bytes free; raises `OSError`."""
    path = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        path.write_bytes(b"\0")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


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
