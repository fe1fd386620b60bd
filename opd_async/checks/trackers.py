"""Check that the trackers of `tracking.trackers` are installed, and logged in where they send."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

from opd_async.config.topology import Topology
from opd_async.telemetry.trackers import command_of

DEADLINE_S = 120.0
MARK = "problem: "


def tracker_problems(topology: Topology) -> Iterator[str]:
    """List the trackers that cannot be used; each is imported in a process of its own, as in the run."""
    section = topology.tracking
    for kind in dict.fromkeys(kind for kind in section.trackers if section.trackers.count(kind) > 1):
        yield f"tracking.trackers: {kind} twice; write it once"
    if section.python is not None and not section.python.is_file():
        yield f"tracking.python: no file {section.python}; write the path of a Python that has the trackers' packages"
        return
    mode = "offline" if section.offline else "online"
    for kind in dict.fromkeys(section.trackers):
        if problem := _problem([*command_of(topology), "--check", kind, mode], kind):
            yield f"tracking.trackers: {problem}"


def _problem(command: list[str], kind: str) -> str | None:
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"{kind} was not imported within {DEADLINE_S:.0f} s; look at what its package does when it starts"
    except OSError as error:
        return f"{command[0]} does not start ({error.strerror}); write tracking.python, a Python that does"
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no word of it"])[-1]
        return f"{kind} ends the process that imports it with code {ended.returncode} ({last})"
    found = [line.removeprefix(MARK) for line in ended.stdout.splitlines() if line.startswith(MARK)]
    return found[0] if found else None
