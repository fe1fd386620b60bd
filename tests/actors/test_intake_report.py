"""The figures of a step, and the latency sample."""

from __future__ import annotations

import numpy as np
import pytest

from opd_async.actors.intake import report as intake_report
from opd_async.actors.intake.report import LatencyReservoir, describe_step
from opd_async.scheduling.assembly import Segment


def segment(start: int, end: int, complete: bool, versions: list[int]) -> Segment:
    logprobs = np.zeros(end - start, np.float32)
    ids = np.zeros(4 + end, np.int32)
    return Segment(
        sample_id=1,
        prompt_tokens=4,
        start=start,
        end=end,
        complete=complete,
        token_ids=ids,
        behaviour_logprobs=logprobs,
        teacher_logprobs=logprobs,
        versions=np.array(versions, np.int32),
    )


def test_a_step_is_described() -> None:
    stats, staleness = describe_step([segment(0, 3, False, [4, 5, 5]), segment(2, 4, True, [3, 5])], 5)
    assert staleness.tolist() == [3, 1, 1]
    assert staleness.dtype == np.int64
    assert stats == {
        "tokens": 5.0,
        "segments": 2.0,
        "completed": 1.0,
        "cuts": 1.0,
        "forwarded_tokens": 15.0,
        "recomputed_tokens": 6.0,
    }


def test_a_step_of_empty_responses_is_described() -> None:
    stats, staleness = describe_step([], 5)
    assert staleness.tolist() == [0]
    assert set(stats.values()) == {0.0}


def test_the_reservoir_is_bounded_and_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_report, "RESERVOIR", 100)
    reservoir = LatencyReservoir()
    assert reservoir.quantiles() == {}
    for value in range(10_000):
        reservoir.add(float(value))
    assert len(reservoir._values) == 100
    assert 3000 < reservoir.quantiles()["score_latency_p50_s"] < 7000
    assert reservoir.quantiles()["score_latency_p99_s"] > 9000
