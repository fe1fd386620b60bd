"""A network, temporary folders and shared memory of its own for the chaos: what is cut or left there is the run's.

    island = make_island(files that must stay in sight)
    island.cut(ports); island.heal()     packets to and from these ports vanish, and nobody is told
    island.left_since(island.present())  what has appeared in /tmp, /var/tmp, /dev/shm and the like

The process moves into Linux namespaces, which end with it. Where it may not (it is not root, `ip` is missing), there
are no cuts, and only shared memory is compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
TEMPORARY = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"))
OWN_RULES, LOCAL_RULE = 10, 100
"""Priorities of routing rules: those of cuts come before the one for addresses of this machine."""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Island:
    """Where the chaos takes place; `own` says whether it has namespaces of its own."""

    def __init__(self, own: bool, compared: Iterable[Path]) -> None:
        self.own = own
        self._compared = tuple(compared)
        self._cut: list[tuple[str, ...]] = []

    def present(self) -> set[Path]:
        """The files and folders that lie directly in the compared folders now; without an island, shared memory."""
        return _shared_memory() if not self.own else {path for folder in self._compared for path in folder.iterdir()}

    def left_since(self, before: set[Path]) -> list[str]:
        """What is there now and was not, in words."""
        return [f"left behind: {path}" for path in sorted(self.present() - before)]

    def cut(self, ports: Iterable[int]) -> None:
        """Let packets to and from these ports of this machine vanish."""
        for port in ports:
            for side in ("sport", "dport"):
                rule = ("pref", str(OWN_RULES), "ipproto", "tcp", side, str(port), "blackhole")
                _ip("rule", "add", *rule)
                self._cut.append(rule)

    def cut_all(self) -> None:
        """Let every packet vanish."""
        rule = ("pref", str(OWN_RULES), "to", "127.0.0.0/8", "blackhole")
        _ip("rule", "add", *rule)
        self._cut.append(rule)

    def heal(self) -> None:
        """End every cut."""
        while self._cut:
            _ip("rule", "del", *self._cut.pop())


def make_island(in_sight: Iterable[Path]) -> Island:
    """Move this process, and what it starts, into namespaces of its own, where it may; before any thread starts."""
    program = (Path(sys.prefix), Path(sys.base_prefix), Path.cwd(), *in_sight)
    hidden = [folder for folder in TEMPORARY if not any(_within(path, folder) for path in program)]
    if os.geteuid() != 0 or shutil.which("ip") is None or not _leave():
        return Island(False, ())
    for folder in hidden:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(folder)], check=True)
    _ip("link", "set", "lo", "up")
    _ip("rule", "add", "pref", str(LOCAL_RULE), "table", "local")
    _ip("rule", "del", "pref", "0")
    return Island(True, hidden)


def _shared_memory() -> set[Path]:
    """What lies in /dev/shm and no living process has mapped."""
    there = set(Path("/dev/shm").iterdir())
    mapped: set[Path] = set()
    for process in psutil.process_iter():
        try:
            mapped |= {Path(part.path) for part in process.memory_maps() if part.path.startswith("/dev/shm/")}
        except (psutil.Error, OSError):
            continue
    return there - mapped


def _within(path: Path, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.resolve().is_relative_to(folder.resolve())
    return True


def _leave() -> bool:
    """Whether this process has left the network and the mounts of the machine."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS | CLONE_NEWNET) != 0:
        return False
    done = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
    return done.returncode == 0
