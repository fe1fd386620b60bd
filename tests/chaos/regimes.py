"""The runs that faults are thrown at: every kind of role, both ways of making steps, with and without a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from harness import SLOTS, topology

FOREVER = 1_000_000
"""Steps: the chaos ends the run."""
COMMON: dict[str, Any] = {
    "schedule__steps": FOREVER,
    "checkpoint__every_steps": 3,
    "checkpoint__keep": 3,
    "rollout__resend_after_s": 2.0,
    "supervisor__restarts": 1000,
    "supervisor__backoff_s": 0.1,
}


class Regime(NamedTuple):
    """A kind of run, its bound on staleness (None for whole responses), and its roles."""

    name: str
    changes: dict[str, Any]
    bound: int | None
    roles: tuple[str, ...]


EVERYBODY = ("rollout", "teacher", "student-engine", "teacher-engine", "intake", "learner")
NO_TEACHER = ("rollout", "student-engine", "intake", "learner")
REGIMES = (
    Regime("tokens, S = 1", {"engines__teacher__replicas": 2}, 1, EVERYBODY),
    Regime(
        "whole responses",
        {
            "schedule__train_on": "samples",
            "schedule__samples_per_step": SLOTS,
            "rollout__replicas": 2,
            "engines__student__replicas": 2,
        },
        None,
        EVERYBODY,
    ),
    Regime("tokens, S = 0", {"schedule__max_staleness": 0}, 0, EVERYBODY),
    Regime(
        "GRPO without a teacher",
        {
            "schedule__train_on": "samples",
            "schedule__samples_per_step": SLOTS,
            "rollout__group_size": 4,
            "reward__kind": "exact_match",
            "advantage__estimator": "grpo",
            "opd__use_opd": False,
        },
        None,
        NO_TEACHER,
    ),
    Regime("tokens, S = 1, two ranks", {"learner__data_parallel": 2}, 1, EVERYBODY),
)


def values_of(regime: Regime, inputs: Path, root: Path) -> dict[str, Any]:
    """The topology of one run."""
    return topology(inputs, root / "runs", **COMMON, **regime.changes)


def in_turn(count: int) -> Iterator[Regime]:
    """So many runs, one regime after the other."""
    for index in range(count):
        yield REGIMES[index % len(REGIMES)]
