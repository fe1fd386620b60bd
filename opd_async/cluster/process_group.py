"""All processes of one role, wherever they went: members of its group, and whoever inherited its mark.

torchrun puts every worker into a session of its own, so a signal to the group alone would leave them behind. Each
start therefore carries a unique mark in its environment, which children inherit.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Callable

import psutil

MARK_ENV = "OPD_PROCESS_MARK"

_FIRST_POLL_S = 0.01
_LAST_POLL_S = 0.2


class ProcessGroup:
    """The processes that descend from one start of a role. Zombies don't count: they hold nothing any more."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.leader: int | None = None
        """Pid of the process that was started, which leads a session; None before the start."""
        self._seen: set[psutil.Process] = set()

    def members(self) -> list[psutil.Process]:
        """The processes alive now. Reads the whole process table: tens of milliseconds on a busy host."""
        found = (self._find(pid) for pid in psutil.pids())
        # A dying process loses its environment before it lets go of its files, ports and devices.
        self._seen.update(process for process in found if process is not None)
        self._seen = {process for process in self._seen if _alive(process)}
        return list(self._seen)

    def signal(self, number: int) -> list[int]:
        """Send a signal to every member; returns the pids of those that were alive."""
        members = self.members()
        for member in members:
            with contextlib.suppress(psutil.NoSuchProcess):  # psutil also checks that the pid was not reused
                member.send_signal(number)
        return [member.pid for member in members]

    async def wait_gone(self, kill_at: Callable[[], float], kill_for_s: float) -> list[int]:
        """Wait until no member is left, with SIGKILL from `kill_at()` on; returns the pids that survived it.

        `kill_at` is asked again at each look, on `time.monotonic`'s scale, so that a second stop can shorten the
        wait. A process can survive SIGKILL for `kill_for_s` only while it sits in the kernel (state D). On cancel:
        nothing is undone, members may be left.
        """
        pause = _FIRST_POLL_S
        # A process tells nobody but its parent that it ended, and these are no children of ours: look again and again.
        while members := self.members():
            late = time.monotonic() - kill_at()
            if late >= kill_for_s:
                return [member.pid for member in members]
            if late >= 0:
                for member in members:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
                pause = _FIRST_POLL_S
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_POLL_S)
        return []

    def _find(self, pid: int) -> psutil.Process | None:
        try:
            process = psutil.Process(pid)
            ours = os.getpgid(pid) == self.leader or process.environ().get(MARK_ENV) == self.mark
            return process if ours else None
        except (psutil.Error, OSError):  # it ended while being looked at, or belongs to another user
            return None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
