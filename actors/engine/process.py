"""Life and death of the engine process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to end this process when its parent ends, unless OPD_DETACHED=1. Linux only; elsewhere a no-op."""
    if os.environ.get("OPD_DETACHED") == "1" or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died before the call; its death signal would then never come.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
