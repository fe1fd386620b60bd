"""A folder for the temporary files of a run's processes on one host: they leave some behind when they are killed.

It lies where temporary files belong, because paths of sockets must be short. Its owner holds a lock on a file in it. A
folder whose lock is free belongs to nobody: its owner was killed, and the next run removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "opd-run-"
LOCK = "lock"


class Scratch:
    """`with Scratch() as folder:`; on a machine without room for temporary files, `folder` is None."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._lock = -1

    def __enter__(self) -> Path | None:
        remove_abandoned()
        with contextlib.suppress(OSError):
            self._folder = Path(tempfile.mkdtemp(prefix=PREFIX))
            fresh = self._folder / f"{LOCK}.new"
            self._lock = os.open(fresh, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            fresh.replace(self._folder / LOCK)  # from here on somebody may look whether it is held
        return self._folder

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_abandoned() -> None:
    """Remove folders of this user whose owners were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid() and _free(folder / LOCK):
                shutil.rmtree(folder, ignore_errors=True)


def _free(lock: Path) -> bool:
    handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
