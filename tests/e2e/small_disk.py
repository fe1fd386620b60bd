"""A disk of a few megabytes for a run's folder, which a test fills, makes read-only, and gives back.

Where this process may not mount one, the same errors come from the limit on the size of files, which the kernel
applies to running processes too, and from folders without a right to write.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Iterable
from pathlib import Path

import psutil


def may_mount(folder: Path) -> bool:
    """Whether this process may mount file systems."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


class SmallDisk:
    """A file system of its own at `path`; a context manager that takes it away again."""

    def __init__(self, path: Path, mib: int = 48) -> None:
        self.path = path
        self._mib = mib
        self._own = may_mount(path)
        self._filler = path / "somebody-else"
        self._limited: list[psutil.Process] = []

    def __enter__(self) -> SmallDisk:
        if self._own:
            self._mount("-t", "tmpfs", "-o", f"size={self._mib}m", "tmpfs")
        return self

    def __exit__(self, *_: object) -> None:
        self.free()
        if self._own:
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def _mount(self, *words: str) -> None:
        subprocess.run(["mount", *words, str(self.path)], check=True, capture_output=True)

    def fill(self, processes: Iterable[psutil.Process] = ()) -> None:
        """Leave no byte; without a disk of its own, no byte for these processes."""
        if not self._own:
            self._limit(processes)
            return
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while os.write(descriptor, b"\0" * size) == size:
                        pass
        finally:
            os.close(descriptor)

    def freeze(self, processes: Iterable[psutil.Process] = ()) -> None:
        """Make it read-only: nobody has a file of it open for writing."""
        if self._own:
            self._mount("-o", "remount,ro")
        elif os.geteuid() != 0:
            for folder in (self.path, *(path for path in self.path.rglob("*") if path.is_dir())):
                folder.chmod(0o555)
        else:
            self._limit(processes)

    def free(self) -> None:
        """Give back what `fill` and `freeze` took."""
        if self._own:
            self._mount("-o", "remount,rw")
        elif os.geteuid() != 0:
            for folder in (self.path, *(path for path in self.path.rglob("*") if path.is_dir())):
                folder.chmod(0o755)
        self._filler.unlink(missing_ok=True)

    def _limit(self, processes: Iterable[psutil.Process]) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    @property
    def words(self) -> tuple[str, ...]:
        """What the kernel says of a full one."""
        return tuple(os.strerror(number) for number in ((errno.ENOSPC,) if self._own else (errno.EFBIG,)))
