"""The runs that faults are thrown at: every kind of role, both ways of making steps, with and without a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from harness import SLOTS, topology
from live import KEY, hang_s

from opd_async.scheduling.leases import UNDER_WAY

FOREVER = 1_000_000
"""Steps: the chaos ends the run."""
COMMON: dict[str, Any] = {
    "schedule__steps": FOREVER,
    "checkpoint__every_steps": 3,
    "checkpoint__keep": 3,
    "rollout__resend_after_s": 2.0,
    "supervisor__restarts": 1000,
    "supervisor__backoff_s": 0.1,
    "teacher__canary_every_s": 2.0,
    "teacher__canary_every_tokens": 4000,
}


class Regime(NamedTuple):
    """A kind of run, its bound on staleness (None for whole responses), and its roles."""

    name: str
    changes: dict[str, Any]
    bound: int | None
    roles: tuple[str, ...]
    external: bool = False
    """Whether somebody else starts the student engine."""

    @property
    def in_flight(self) -> int:
        """Most samples that are leased and not trained to their end: those that wait for tools need no slot."""
        return ((UNDER_WAY if "rollout__function" in self.changes else 1) + 1) * SLOTS


EVERYBODY = ("rollout", "teacher", "student-engine", "teacher-engine", "intake", "learner")
NO_TEACHER = ("rollout", "student-engine", "intake", "learner")
EPISODES: dict[str, Any] = {"rollout__function": "chaos_episode:episode", "reward__kind": "episode"}
OUTSIDE = ("rollout", "teacher", "external", "teacher-engine", "intake", "learner")
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
    Regime("tokens, S = 0", {"schedule__max_staleness": 0, "schedule__rule": "filled"}, 0, EVERYBODY),
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
    Regime("tokens, S = 1, two ranks", {"learner__data_parallel": 2, "schedule__rule": "filled"}, 1, EVERYBODY),
    Regime("episodes with tools, S = 1", EPISODES | {"schedule__rule": "filled"}, 1, EVERYBODY),
    Regime(
        "whole episodes with tools, two actors",
        EPISODES
        | {
            "schedule__train_on": "samples",
            "schedule__samples_per_step": SLOTS,
            "rollout__replicas": 2,
            "engines__student__replicas": 2,
        },
        None,
        EVERYBODY,
    ),
    Regime("a student engine of others", {"schedule__rule": "filled"}, 1, OUTSIDE, external=True),
)


def values_of(regime: Regime, inputs: Path, root: Path, urls: tuple[str, ...] = ()) -> dict[str, Any]:
    """The topology of one run; `urls` are those of student engines that others start."""
    values = topology(inputs, root / "runs", **COMMON, **regime.changes)
    values["supervisor"]["heartbeat_deadline_s"] = hang_s()
    for side in ("student", "teacher"):
        values["engines"][side] |= {"api_key": KEY, "admin_api_key": KEY}
    if urls:
        values["engines"]["student"] |= {"kind": "external", "urls": list(urls)}
    return values
