"""The catalogue, and that the exporters, the page and the dashboard say the same."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import urllib.request
from pathlib import Path

import pytest
from deadlines import patience
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from opd_async.errors import OpdError
from opd_async.telemetry.exporter import RoleMetrics, loop_lag, write_targets
from opd_async.telemetry.metrics import CATALOGUE, ROLES, MetricKind, markdown

ROOT = Path(__file__).parents[2]
NAMES = {metric.name for metric in CATALOGUE}


def scrape(port: int) -> str:
    """What Prometheus would read."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=patience(30)) as reply:
        text: bytes = reply.read()
        return text.decode()


def samples(text: str) -> dict[str, float]:
    """Value by `name{labels}`."""
    families = text_string_to_metric_families(text)
    found = [sample for family in families for sample in family.samples]
    return {s.name + "".join(f"{{{k}={v}}}" for k, v in s.labels.items()): s.value for s in found}


def test_roles() -> None:
    assert ROLES == ("launcher", "rollout", "engine", "teacher", "intake", "learner")


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_names_and_kinds(metric: object) -> None:
    entry = next(entry for entry in CATALOGUE if entry is metric)
    assert re.fullmatch(r"opd_[a-z]+_[a-z_]+", entry.name)
    assert entry.name.endswith("_total") == (entry.kind is MetricKind.COUNTER)
    assert bool(entry.buckets) == (entry.kind is MetricKind.HISTOGRAM)
    assert list(entry.buckets) == sorted(set(entry.buckets))
    assert entry.help.endswith(".") and "|" not in entry.help


def test_names_are_unique() -> None:
    assert len(NAMES) == len(CATALOGUE)


@pytest.mark.parametrize("role", ROLES)
def test_an_exporter_serves_exactly_its_roles_catalogue(role: str) -> None:
    metrics = RoleMetrics(role)
    with metrics.serve("127.0.0.1", 0) as port:
        text = scrape(port)
    served = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert served == {metric.name: metric.kind.value for metric in CATALOGUE if metric.role == role}


def test_values_arrive() -> None:
    metrics = RoleMetrics("teacher")
    metrics["opd_teacher_scored_tokens_total"].inc(512)
    metrics["opd_teacher_queue_tokens"].set(7)
    metrics["opd_teacher_malformed_total"].labels(kind="schema").inc()
    metrics["opd_teacher_batch_tokens"].observe(64)
    metrics["opd_teacher_batch_tokens"].observe(1e9, count=2)
    found = samples(generate_latest(metrics.registry).decode())
    assert found["opd_teacher_scored_tokens_total"] == 512
    assert found["opd_teacher_queue_tokens"] == 7
    assert found["opd_teacher_malformed_total{kind=schema}"] == 1
    assert found["opd_teacher_batch_tokens_bucket{le=64.0}"] == 1
    assert found["opd_teacher_batch_tokens_bucket{le=+Inf}"] == 3
    assert found["opd_teacher_batch_tokens_sum"] == 64 + 2e9


def test_what_was_not_computed_has_no_series() -> None:
    """Neither before the first step nor after one without it: not 0, which would be a figure like any other."""
    metrics = RoleMetrics("learner")
    figures = {metric.name for metric in CATALOGUE if metric.absent}
    assert {"opd_intake_reward_mean", "opd_learner_reverse_kl", "opd_learner_loss"} <= figures
    for value in (None, 0.0, 0.25, None):
        metrics["opd_learner_reverse_kl"].set(value)
        found = samples(generate_latest(metrics.registry).decode())
        assert found.get("opd_learner_reverse_kl") == value
        assert "opd_learner_loss" not in found
    assert "opd_intake_reward_mean" not in samples(generate_latest(RoleMetrics("intake").registry).decode())


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 1000)), max_size=20))
def test_staleness_is_counted_by_token(observations: list[tuple[int, int]]) -> None:
    metrics = RoleMetrics("intake")
    for steps, tokens in observations:
        metrics["opd_intake_staleness_steps"].observe(steps, tokens)
    found = samples(generate_latest(metrics.registry).decode())
    for bound in range(17):
        expected = sum(tokens for steps, tokens in observations if steps <= bound)
        assert found[f"opd_intake_staleness_steps_bucket{{le={bound}.0}}"] == expected
    assert found["opd_intake_staleness_steps_count"] == sum(tokens for _, tokens in observations)
    assert found["opd_intake_staleness_steps_sum"] == sum(steps * tokens for steps, tokens in observations)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KeyError, match="no metrics for 'student'"):
        RoleMetrics("student")
    with pytest.raises(KeyError, match="is no metric of rollout"):
        RoleMetrics("rollout")["opd_learner_loss"]


def test_a_taken_port_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"metrics of rollout cannot be served on 127.0.0.1:{port}"
        with pytest.raises(OpdError, match=message), RoleMetrics("rollout").serve("127.0.0.1", port):
            pass


async def test_loop_lag_is_observed() -> None:
    metrics = RoleMetrics("rollout")
    lag = asyncio.create_task(loop_lag(metrics["opd_rollout_loop_lag_seconds"], interval_s=0.0))
    for _ in range(10):
        await asyncio.sleep(0)
    lag.cancel()
    await asyncio.wait([lag])
    assert lag.cancelled()
    assert samples(generate_latest(metrics.registry).decode())["opd_rollout_loop_lag_seconds_count"] > 1


def test_targets_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "targets.json"
    write_targets(path, {"old": "127.0.0.1:1"})
    write_targets(path, {"rollout-0": "127.0.0.1:9000", "learner-0": "127.0.0.1:9001"})
    assert json.loads(path.read_text()) == [
        {"targets": ["127.0.0.1:9000"], "labels": {"process": "rollout-0"}},
        {"targets": ["127.0.0.1:9001"], "labels": {"process": "learner-0"}},
    ]
    assert [file.name for file in path.parent.iterdir()] == ["targets.json"]


def test_the_page_is_made_from_the_catalogue() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == markdown(), "run: python -m opd_async.telemetry.metrics > docs/metrics.md"


def test_the_dashboard_names_only_metrics_of_the_catalogue() -> None:
    dashboard = json.loads((ROOT / "dashboards" / "opd_async.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    expressions += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    names = {name for expression in expressions for name in re.findall(r"\bopd_\w+", expression)}
    series = NAMES | {
        metric.name + suffix
        for metric in CATALOGUE
        if metric.kind is MetricKind.HISTOGRAM
        for suffix in ("_bucket", "_sum", "_count")
    }
    assert names <= series, names - series
    assert {metric.role for metric in CATALOGUE if metric.name in names} == set(ROLES)


def test_dashboard_panels_do_not_overlap() -> None:
    dashboard = json.loads((ROOT / "dashboards" / "opd_async.json").read_text())
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
