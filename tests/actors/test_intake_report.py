"""The figures of a step, and the latency sample."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from taken_samples import taken

from opd_async.actors.intake import report as intake_report
from opd_async.actors.intake.figures import StepFigures
from opd_async.actors.intake.report import LatencyReservoir, describe_distribution, describe_responses, describe_step
from opd_async.config.topology import TrainOn
from opd_async.scheduling.further import FURTHER_IDS
from opd_async.scheduling.segments import Segment
from opd_async.telemetry.exporter import RoleMetrics


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
    assert reservoir._values.shape == (100,)
    assert 3000 < reservoir.quantiles()["score_latency_p50_s"] < 7000
    assert reservoir.quantiles()["score_latency_p99_s"] > 9000


def test_responses_that_end_in_a_step_are_described() -> None:
    step = [taken(1, 0, 10), taken(2, 10, 30), taken(3, 0, 50, complete=False)]
    step.append(taken(4, 0, 0)._replace(segment=None, finish="stop"))
    found = describe_responses(step)
    assert found.pop("response_tokens_p99") == pytest.approx(np.quantile([10, 30, 0], 0.99))
    assert found == {
        "response_tokens_mean": pytest.approx(40 / 3),
        "at_limit_share": pytest.approx(2 / 3),  # of the three, two ended by `length`
        "prompt_tokens_mean": 3.0,
    }
    assert describe_responses([taken(3, 0, 50, complete=False)]) == {}
    begun = [taken(one, 0, 5)._replace(episode=1) for one in (FURTHER_IDS, FURTHER_IDS + 1)]
    assert describe_responses([*step, *begun])["further_samples"] == 2.0
    assert describe_responses([step[-1]]) == {
        "response_tokens_mean": 0.0,
        "response_tokens_p99": 0.0,
        "at_limit_share": 0.0,
    }


def scored(behaviour: list[float], teacher: list[float], name: str) -> Segment:
    one = segment(0, len(behaviour), True, [0] * len(behaviour))
    one.behaviour_logprobs = np.array(behaviour, np.float32)
    one.teacher_logprobs = np.array(teacher, np.float32)
    one.teacher = name
    return one


def test_entropy_and_each_teachers_kl_are_means_over_sampled_tokens() -> None:
    # a given token has mu = 1 and counts nowhere
    both = [scored([-1.0, -2.0, 0.0], [-1.5, -4.0, -9.0], "code"), scored([-3.0], [-2.5], "math")]
    assert describe_distribution(both) == {"sampled_entropy": pytest.approx(2.0)}
    assert describe_distribution(both, several=True) == {
        "sampled_entropy": pytest.approx(2.0),
        "teacher_kl.code": pytest.approx((0.5 + 2.0) / 2),
        "teacher_share.code": pytest.approx(2 / 3),
        "teacher_kl.math": pytest.approx(-0.5),
        "teacher_share.math": pytest.approx(1 / 3),
    }
    assert describe_distribution([scored([0.0], [-1.0], "code")], several=True) == {}
    assert describe_distribution([scored([-1.0], [], "")], several=True) == {"sampled_entropy": 1.0}


def test_entropy_is_that_of_the_distribution_that_was_sampled_from() -> None:
    rng = np.random.default_rng(0)
    p = np.array([0.7, 0.2, 0.1])
    drawn = np.log(p[rng.choice(3, 200_000, p=p)])
    found = describe_distribution([scored(drawn.tolist(), drawn.tolist(), "")])["sampled_entropy"]
    assert found == pytest.approx(-(p * np.log(p)).sum(), abs=0.01)


def value(metrics: RoleMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def figures_of(train_on: TrainOn, metrics: RoleMetrics) -> StepFigures:
    topology: Any = SimpleNamespace(schedule=SimpleNamespace(train_on=train_on, tokens_per_step=20), teachers={})
    return StepFigures(topology, metrics)


def test_the_figures_of_a_step_reach_prometheus_and_its_row() -> None:
    metrics = RoleMetrics("intake")
    figures = figures_of(TrainOn.TOKENS, metrics)
    step = [taken(1, 0, 10), taken(2, 10, 30)]
    row = figures.of_step(step, [one.segment for one in step if one.segment is not None])
    assert row["budget_share"] == 1.5 and value(metrics, "opd_intake_budget_share") == 1.5
    assert value(metrics, "opd_intake_response_tokens_sum") == 40
    assert value(metrics, "opd_intake_at_limit_share") == 1.0
    assert value(metrics, "opd_intake_sampled_entropy") == pytest.approx(row["sampled_entropy"])
    figures.of_step([], [])
    assert value(metrics, "opd_intake_at_limit_share") is None, "absent, and not 0"
    assert "budget_share" not in figures_of(TrainOn.SAMPLES, RoleMetrics("intake")).of_step(step, [])
