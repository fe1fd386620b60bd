"""A warning where responses shrink: once, against the first steps, and not for noise."""

from __future__ import annotations

import numpy as np

from opd_async.telemetry.length_drift import SHRUNK, WINDOW, LengthDrift
from opd_async.telemetry.progress import Progress
from opd_async.transport.messages import StepStarted


def said(lengths: list[float | None]) -> list[tuple[int, str]]:
    drift = LengthDrift()
    found = [(step, drift.step(length)) for step, length in enumerate(lengths)]
    return [(step, text) for step, text in found if text is not None]


def test_responses_that_shrink_are_named_once() -> None:
    lengths: list[float | None] = [100.0] * WINDOW + [None] + [60.0] * (3 * WINDOW)
    ((step, text),) = said(lengths)
    assert step == 2 * WINDOW  # when a whole window is short
    assert text.startswith("warning: responses have shrunk from 100 to 60 tokens")


def test_noise_and_growth_are_not() -> None:
    rng = np.random.default_rng(0)
    assert said([float(x) for x in rng.normal(100, 20, 400)]) == []
    assert said([float(x) for x in np.linspace(100, 900, 100)]) == []
    assert said([100.0 * (SHRUNK + 0.01)] * 50) == []
    assert said([100.0] * WINDOW + [10.0] * (WINDOW - 1)) == []


def test_the_terminal_says_it_where_a_teacher_knows_more() -> None:
    def lines(watched: bool) -> list[str]:
        shown: list[str] = []
        progress = Progress(shown.append, 1000, drift=LengthDrift() if watched else None)
        for step in range(3 * WINDOW):
            stats = {"tokens": 1.0, "cuts": 0.0, "response_tokens_mean": 100.0 if step < WINDOW else 50.0}
            started = StepStarted(
                version=step,
                waited_s=0.0,
                staleness_counts=np.ones(1, np.int64),
                taken_ids=np.zeros(0, np.int64),
                taken_ends=np.zeros(0, np.int32),
                taken_complete=np.zeros(0, np.int32),
                stats=stats,
            )
            progress.step(step, {}, started)
        return [line for line in shown if "shrunk" in line]

    assert len(lines(True)) == 1 and lines(False) == []
