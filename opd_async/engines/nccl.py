"""Which NCCL an environment has: ranks of one group must have the same, and two versions of torch rarely bring it."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path

DEADLINE_S = 20.0
PREFIX = "nvidia-nccl-"
_CODE = """
import json
from importlib.metadata import distributions
print(json.dumps({d.name.lower(): d.version for d in distributions() if d.name}))
"""


@cache
def nccl_versions(python: Path) -> dict[str, str]:
    """The packages of NCCL in the environment of `python` and its torch, by name; empty if it cannot be run.

    Reads package metadata only, in that Python: torch itself takes seconds to import. torch for CPUs has no NCCL.
    """
    try:
        done = subprocess.run(
            [str(python), "-c", _CODE], capture_output=True, text=True, timeout=DEADLINE_S, check=True
        )
        packages: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}
    return {name: version for name, version in packages.items() if name == "torch" or name.startswith(PREFIX)}


def nccl_difference(ours: Path, theirs: Path) -> str | None:
    """What differs between two environments that are to be in one NCCL group; None if nothing does, or is known."""
    both = nccl_versions(ours), nccl_versions(theirs)
    found = [{version for name, version in one.items() if name.startswith(PREFIX)} for one in both]
    if not all(found) or found[0] & found[1]:
        return None
    said = [
        f"{'/'.join(sorted(nccl))} (torch {one.get('torch', 'unknown')})" for nccl, one in zip(found, both, strict=True)
    ]
    return f"NCCL {said[0]} in {ours} and {said[1]} in {theirs}"
