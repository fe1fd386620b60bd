"""The soak finds what grows, and sees every role of a real run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from opd_async.bench import soak

RANDOM = np.random.default_rng(0)


def points(value: np.ndarray) -> list[tuple[float, float]]:
    return [(100.0 * index, float(one)) for index, one in enumerate(value)]


def walk(count: int) -> np.ndarray:
    """Noise of which neighbours resemble each other."""
    noise = RANDOM.normal(size=count + 20)
    return np.convolve(noise, np.ones(20) / 20, "valid")[:count]


@pytest.mark.parametrize("drift", [0.0, -0.5])
def test_noise_and_what_shrinks_do_not_grow(drift: float) -> None:
    rows = [soak.fitted("a", "memory (MiB)", points(500.0 + walk(400) + drift * np.arange(400))) for _ in range(40)]
    assert sum(row.grows for row in rows) <= 1


def test_a_leak_below_the_noise_of_a_single_look_is_found() -> None:
    grown = 500.0 + 3.0 * walk(400) + 0.05 * np.arange(400)
    row = soak.fitted("a", "memory (MiB)", points(grown))
    assert row.grows and row.slope == pytest.approx(0.5, abs=0.15) and row.end > row.begin


def test_what_grows_while_it_warms_up_is_left_out() -> None:
    warm = np.minimum(np.arange(300) * 5.0, 490.0)
    assert not soak.fitted("a", "memory (MiB)", points(warm)).grows
    assert soak.fitted("a", "open files", points(np.arange(300) / 10.0)).grows


@pytest.mark.long
def test_a_short_soak_sees_every_role(tmp_path: Path) -> None:
    settings = ("schedule.tokens_per_step=512", "rollout.slots=32")
    rows, count = soak.soak(tmp_path, 300, 0.05, settings)
    seen = {row.role for row in rows if row.figure == "memory (MiB)"}
    assert seen == {
        "launcher",
        "rollout-0",
        "teacher-0",
        "intake-0",
        "learner-0",
        "student-engine-0",
        "teacher-engine-0",
    }
    assert count >= 300
    assert all(row.begin > 10.0 for row in rows if row.figure == "memory (MiB)")
    assert {row.figure for row in rows} >= {"open files", "threads", "opd_launcher_leases_active"}
    assert json.loads(json.dumps([dataclasses.asdict(row) for row in rows]))[0]["role"] == rows[0].role
    lines = soak.table(rows).splitlines()
    assert len(lines) == len(rows) + 1 and "for 1,000 samples" in lines[0]
