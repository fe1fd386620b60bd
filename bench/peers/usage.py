"""What a side costs while it runs: processor time and memory of all its processes, sampled.

Shapes: none. Memory counts pages that processes share once (PSS).
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil

EVERY_S = 0.5
MEMORY_EVERY = 8
"""Memory is read with every so manyth sample: the kernel walks all pages for it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """At `time` (seconds since 1970): processor seconds so far, of processes that have ended too, and bytes now."""

    time: float
    cpu_s: float
    memory: int


def watched(process: subprocess.Popen[bytes], deadline_s: float) -> list[Usage]:
    """Sample `process` and all that descends from it until it ends; `subprocess.TimeoutExpired` past the deadline."""
    root, give_up, found = psutil.Process(process.pid), time.monotonic() + deadline_s, list[Usage]()
    memory = 0
    while True:
        family = _family(root)
        if len(found) % MEMORY_EVERY == 0 or len(found) == 1:  # the first look may come before the program is there
            memory = sum(_memory(one) for one in family)
        found.append(Usage(time.time(), sum(_cpu_s(one) for one in family), memory))
        try:
            process.wait(EVERY_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > give_up:
                raise
        else:
            return found


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(process: psutil.Process) -> float:
    """Of the process and of those of its children that have ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system + times.children_user + times.children_system)


def _memory(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def cpu_between(usage: Sequence[Usage], began: float, ended: float) -> float:
    """Processor seconds from `began` to `ended` (seconds since 1970), on straight lines between samples."""
    times, spent = np.array([(one.time, one.cpu_s) for one in usage]).T
    first, last = np.interp([began, ended], times, np.maximum.accumulate(spent))
    return float(last - first)


def peak_memory(usage: Sequence[Usage]) -> int:
    """Bytes."""
    return max(one.memory for one in usage)
