"""Memory that a process has freed goes back to the system, now and then."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest
from deadlines import patience

from opd_async import freed_memory
from opd_async.freed_memory import EVERY_S, GivesBack, give_back_regularly

BETWEEN = """
import json, psutil
from opd_async.freed_memory import give_back

def resident():
    return psutil.Process().memory_info().rss / 2**20

kept = [b"x" * 100_000 for _ in range(2000)]
full = resident()
kept = kept[::2]
freed = resident()
give_back()
print(json.dumps([full, freed, resident()]))
"""
"""Frees every second of 2,000 pieces of memory, each too small to be mapped by itself."""


def test_what_lies_between_pieces_in_use_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN], capture_output=True, text=True, timeout=patience(60), check=True
    )
    full, freed, given_back = json.loads(done.stdout)
    assert full - freed < 20.0, "glibc keeps it"
    assert freed - given_back > 70.0, "half of 190 MiB, but for the pages at the edges of the pieces"


def test_not_twice_within_a_while() -> None:
    now, given = [100.0], []
    gives_back = GivesBack(lambda: given.append(now[0]), lambda: now[0])
    for later in (0.0, EVERY_S - 1.0, 1.0, 1.0, EVERY_S, EVERY_S / 2):
        now[0] += later
        gives_back()
    assert given == [100.0 + EVERY_S, 101.0 + 2 * EVERY_S]


async def test_a_loop_does_it_for_as_long_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "EVERY_S", 0.001)
    given = asyncio.Event()
    count = 0

    def give() -> None:
        nonlocal count
        count += 1
        if count == 3:
            given.set()

    give_back_regularly(asyncio.get_running_loop(), give)
    await asyncio.wait_for(given.wait(), patience(10))
