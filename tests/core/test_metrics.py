"""The catalogue, and that the exporters, the page and the dashboard say the same."""

from __future__ import annotations

import asyncio
import copy
import json
import re
import socket
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
from deadlines import patience
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from opd_async.config.topology import Topology
from opd_async.errors import OpdError
from opd_async.telemetry.exporter import RoleMetrics, loop_lag, write_targets
from opd_async.telemetry.features import features_of
from opd_async.telemetry.metrics import CATALOGUE, ROLES, Feature, Metric, MetricKind, markdown

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
    assert ROLES == ("launcher", "rollout", "engine", "teacher", "intake", "learner", "host")


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
    own = {name: kind for name, kind in served.items() if not name.startswith("process_")}
    assert own == {metric.name: metric.kind.value for metric in CATALOGUE if metric.role == role}
    assert {"process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"} <= set(served)
    assert samples(text)["process_resident_memory_bytes"] > 1e6


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


def test_labelled_counters_begin_at_0() -> None:
    """`increase` over a series that begins at 1 is 0: the first event would be invisible."""
    known = [metric for metric in CATALOGUE if metric.kind is MetricKind.COUNTER and metric.labels and metric.begins]
    by_plan = {"restarts", "hangs", "slow_engines", "foreign_weights", "tracker_lost"}
    labelled = {metric.name for metric in CATALOGUE if metric.kind is MetricKind.COUNTER and metric.labels}
    assert labelled == {m.name for m in known} | {f"opd_launcher_{what}_total" for what in by_plan}
    for role in ROLES:
        found = samples(generate_latest(RoleMetrics(role).registry).decode())
        for metric in known:
            if metric.role == role:
                assert [found[f"{metric.name}{{{metric.labels[0]}={value}}}"] for value in metric.begins] == [
                    0.0 for _ in metric.begins
                ]
    metrics = RoleMetrics("launcher")
    metrics.begin("opd_launcher_restarts_total", ["rollout-0"])
    assert samples(generate_latest(metrics.registry).decode())["opd_launcher_restarts_total{role=rollout-0}"] == 0.0


def test_what_is_off_has_no_series_and_may_be_set(tmp_path: Path) -> None:
    """A run without rewards has no mean reward, no time to a reward, and no failure of one."""
    without = RoleMetrics("rollout", features=set(Feature) - {Feature.REWARDS})
    without["opd_rollout_reward_seconds"].observe(1.0)
    without["opd_rollout_reward_failures_total"].labels("timeout").inc()
    text = generate_latest(without.registry).decode()
    assert "opd_rollout_reward" not in text and "opd_rollout_tokens_total" in text
    assert "opd_rollout_reward_seconds_bucket" in generate_latest(RoleMetrics("rollout").registry).decode()


def test_which_features_a_run_has() -> None:
    least = {
        "name": "least",
        "models": {"student": {"path": "student"}, "teacher": {"path": "teacher"}},
        "data": {"train": {"path": "prompts.jsonl"}},
        "schedule": {"steps": 1},
    }
    assert features_of(Topology.model_validate(least)) == {Feature.BUDGET, Feature.BOUND, Feature.SLOW_ENGINES}
    most = copy.deepcopy(least) | {
        "reward": {"kind": "exact_match"},
        "schedule": {"steps": 1, "train_on": "samples", "filter": "mine:keep", "max_staleness": 0},
        "supervisor": {"slow_engine": None},
    }
    most["data"]["held_out"] = {"path": "held_out.jsonl"}  # type: ignore[index]
    wanted = {Feature.REWARDS, Feature.FILTER, Feature.BOUND, Feature.EVALUATION}
    assert features_of(Topology.model_validate(most)) == wanted


def test_counters_go_on_after_a_restart(tmp_path: Path) -> None:
    """From what was scraped last, or from the end of a process that ended in order; not gauges, nor the process's."""
    path = tmp_path / "counters" / "teacher-0.json"
    first = RoleMetrics("teacher", counters_file=path)
    first["opd_teacher_scored_tokens_total"].inc(512)
    first["opd_teacher_malformed_total"].labels("chunk").inc(2)
    first["opd_teacher_score_latency_seconds"].observe(0.3, count=4)
    first["opd_teacher_queue_tokens"].set(7)
    seen = samples(generate_latest(first.registry).decode())
    first["opd_teacher_scored_tokens_total"].inc(1000)  # nobody has seen these, and the process is killed
    second = RoleMetrics("teacher", counters_file=path)
    found = samples(generate_latest(second.registry).decode())
    counted = {name: value for name, value in seen.items() if "_total" in name or "_latency_" in name}
    counted = {name: value for name, value in counted.items() if name.startswith("opd_")}
    assert counted["opd_teacher_scored_tokens_total"] == 512.0 and len(counted) > 70
    assert {name: found[name] for name in counted} == counted
    assert found["opd_teacher_queue_tokens"] == 0.0
    with second.serve("127.0.0.1", 0):
        second["opd_teacher_score_latency_seconds"].observe(0.3)
    third = samples(generate_latest(RoleMetrics("teacher", counters_file=path).registry).decode())
    assert third["opd_teacher_score_latency_seconds_count"] == 5.0
    assert third["opd_teacher_score_latency_seconds_sum"] == pytest.approx(1.5)
    assert [file.name for file in path.parent.iterdir()] == ["teacher-0.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": 1}',
        '{"[\\"opd_teacher_batches_total\\"]": -1}',
        '{"[\\"x\\"]": "1"}',
        "null",
        '{"[1, 2]": 3}',
    ],
)
def test_kept_counters_that_make_no_sense_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    path = tmp_path / "teacher-0.json"
    path.write_text(text)
    found = samples(generate_latest(RoleMetrics("teacher", counters_file=path).registry).decode())
    assert found["opd_teacher_batches_total"] == 0.0
    assert f"{path} cannot be read" in caplog.text


def test_kept_buckets_of_another_version_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "teacher-0.json"
    generate_latest(RoleMetrics("teacher", counters_file=path).registry)
    kept = json.loads(path.read_text())
    name = "opd_teacher_batch_tokens"
    others = {key: value for key, value in kept.items() if name not in key}
    others |= {f'["{name}_bucket", ["le", "64.0"]]': 3.0, f'["{name}_bucket", ["le", "+Inf"]]': 3.0}
    path.write_text(json.dumps(others | {f'["{name}_sum"]': 99.0}))
    found = samples(generate_latest(RoleMetrics("teacher", counters_file=path).registry).decode())
    assert (found[f"{name}_count"], found[f"{name}_sum"]) == (0.0, 0.0)


def test_a_disk_that_takes_no_counters_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "counters").write_text("a file where a folder should be")
    metrics = RoleMetrics("teacher", counters_file=tmp_path / "counters" / "teacher-0.json")
    assert "opd_teacher_batches_total 0.0" in generate_latest(metrics.registry).decode()


@pytest.mark.parametrize(
    "metric", [m for m in CATALOGUE if m.kind is MetricKind.HISTOGRAM and "_steps" not in m.name], ids=lambda m: m.name
)
def test_a_median_is_hardly_interpolated(metric: Metric) -> None:
    """Two neighbouring bounds are less than 30 % apart, or whole numbers that follow one another."""
    ratios = [after / before for before, after in pairwise(metric.buckets) if after - before != 1.0]
    assert max(ratios) < 1.3 and metric.buckets[0] <= 1.0 and metric.buckets[-1] / metric.buckets[0] >= 1e4


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
    write_targets(path, {"old": "127.0.0.1:1"}, {}, "my-run")
    labels = {"teacher-0": {"teacher": "maths", "host": "b"}}
    write_targets(path, {"teacher-0": "127.0.0.1:9000", "learner-0": "127.0.0.1:9001"}, labels, "my-run")
    teacher = {"process": "teacher-0", "run": "my-run", "teacher": "maths", "host": "b"}
    assert json.loads(path.read_text()) == [
        {"targets": ["127.0.0.1:9000"], "labels": teacher},
        {"targets": ["127.0.0.1:9001"], "labels": {"process": "learner-0", "run": "my-run"}},
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
    assert all('run=~"$run"' in expression or "label_values" in expression for expression in expressions)
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
