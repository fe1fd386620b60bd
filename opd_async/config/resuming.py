"""Which keys of a topology may differ when a run is resumed."""

from __future__ import annotations

from fnmatch import fnmatch

MAY_CHANGE = (
    *("schedule.steps", "checkpoint.*", "evaluation.*", "supervisor.*", "network.*", "run_dir"),
    *("reward.workers", "reward.concurrency", "reward.timeout_s"),
)
"""Dotted keys that do not make the run another one; `*` stands for any end."""


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value at this dotted key."""
    return any(fnmatch(key, pattern) for pattern in MAY_CHANGE)
