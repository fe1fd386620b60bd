"""Deadlines of tests: they are there so that a hang ends with a name, and never because a machine is slow."""

from __future__ import annotations

import os

GENEROUS = 6.0
"""How much longer than on an idle machine anything may take on one that is about to get busy."""


def patience(seconds: float) -> float:
    """Deadline in seconds for what takes at most `seconds` on an idle machine: the longer, the busier this one is."""
    return seconds * GENEROUS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
