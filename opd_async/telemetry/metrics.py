"""Declare every metric of the system in one catalogue; make the exporters and the documentation page from it.

    python -m opd_async.telemetry.metrics    prints docs/metrics.md

Names are `opd_<role>_<what>_<unit>`; counters end in `_total`. Each process exports its own role's metrics and
nothing else; which process a series comes from is in the `process` label that `write_targets` gives to Prometheus.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from opd_async.errors import OpdError

LAG_INTERVAL_S = 0.05


class MetricKind(StrEnum):
    """How a metric behaves; the values are Prometheus's names."""

    COUNTER = "counter"
    """Only grows; look at its rate."""
    GAUGE = "gauge"
    """The value now."""
    HISTOGRAM = "histogram"
    """Observations counted by bucket; look at its quantiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One entry of the catalogue. `buckets` are inclusive upper bounds, without infinity."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    absent: bool = False
    """A gauge that has no value until it is set, and none while it is set to None: what was not computed is not 0."""

    @property
    def role(self) -> str:
        """The role that exports the metric: the second word of its name."""
        return self.name.split("_")[1]


_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)
_TOKENS = tuple(float(2**power) for power in range(6, 18))
_STALENESS = tuple(float(steps) for steps in range(17))


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.COUNTER, help=text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.GAUGE, help=text, labels=labels)


def _figure(name: str, text: str) -> Metric:
    return Metric(name=name, kind=MetricKind.GAUGE, help=f"{text} Absent where it is not computed.", absent=True)


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=name, kind=MetricKind.HISTOGRAM, help=text, buckets=buckets)


def _lag(role: str) -> Metric:
    return _histogram(f"opd_{role}_loop_lag_seconds", "How late the event loop woke up from a sleep.", _LAG)


def _strangers(role: str) -> Metric:
    text = "Connections and messages refused: no key of this run, or another's name."
    return _counter(f"opd_{role}_strangers_total", text)


CATALOGUE: tuple[Metric, ...] = (
    _gauge("opd_launcher_step", "Optimizer steps taken."),
    _gauge("opd_launcher_weight_version", "Weight version that every student engine has loaded."),
    _gauge("opd_launcher_leases_active", "Leases out: samples being generated, scored or waiting to be trained."),
    _counter("opd_launcher_restarts_total", "Restarts of a role's process.", "role"),
    _counter("opd_launcher_trained_tokens_total", "Response tokens trained."),
    _counter("opd_launcher_failures_total", "Failures that roles reported.", "kind"),
    _strangers("launcher"),
    _counter("opd_launcher_malformed_total", "Messages dropped because they do not decode, or say what cannot be."),
    _lag("launcher"),
    _counter("opd_rollout_tokens_total", "Response tokens generated."),
    _counter("opd_rollout_chunks_total", "Chunks sent to teachers, resent ones not counted."),
    _gauge("opd_rollout_running_requests", "Generations running in the student engines."),
    _counter("opd_rollout_idle_seconds_total", "Time without any running generation."),
    _counter("opd_rollout_blocked_seconds_total", "Time in which engines were paused for a weight update."),
    _counter("opd_rollout_resent_chunks_total", "Chunks sent again, unacknowledged or after a teacher died."),
    _counter("opd_rollout_engine_errors_total", "Failed requests to student engines.", "kind"),
    _gauge("opd_rollout_breaker_open", "1 while an engine is given no requests because it failed.", "engine"),
    _histogram("opd_rollout_reward_seconds", "From the end of a response to its reward.", _SECONDS),
    _counter("opd_rollout_reward_failures_total", "Responses without a reward: timeout, error, worker_died.", "kind"),
    _gauge("opd_rollout_unacknowledged_chunks", "Chunks kept until the learner acknowledges them."),
    _lag("rollout"),
    _gauge("opd_engine_running_requests", "Requests that hold keys and values."),
    _gauge("opd_engine_waiting_requests", "Requests in the queue."),
    _gauge("opd_engine_kv_used_tokens", "Cache slots held by running requests."),
    _gauge("opd_engine_kv_cached_tokens", "Cache slots that only the prefix cache holds."),
    _counter("opd_engine_generated_tokens_total", "Tokens sampled."),
    _counter("opd_engine_prompt_tokens_total", "Prompt tokens of admitted requests."),
    _counter("opd_engine_cached_tokens_total", "Prompt tokens served from the prefix cache."),
    _counter("opd_engine_finished_requests_total", "Requests that finished or were aborted."),
    _counter("opd_engine_retracted_requests_total", "Times that a request lost its keys and values."),
    _counter("opd_engine_busy_seconds_total", "Time spent in model steps."),
    _counter("opd_engine_steps_total", "Model steps."),
    _histogram("opd_engine_weight_load_seconds", "Receiving and loading one weight update.", _SECONDS),
    _counter("opd_teacher_scored_tokens_total", "Response tokens scored."),
    _counter("opd_teacher_computed_tokens_total", "Tokens that teacher engines computed, prefixes included."),
    _counter("opd_teacher_cached_tokens_total", "Tokens that teacher engines took from their prefix cache."),
    _counter("opd_teacher_batches_total", "Scoring batches sent to teacher engines."),
    _histogram("opd_teacher_batch_tokens", "New tokens in a scoring batch.", _TOKENS),
    _gauge("opd_teacher_queue_tokens", "New tokens that wait for a scoring batch."),
    _counter("opd_teacher_idle_seconds_total", "Time without any scoring batch in flight."),
    _histogram("opd_teacher_score_latency_seconds", "From the last token of a sample to its score.", _SECONDS),
    _strangers("teacher"),
    _counter("opd_teacher_malformed_total", "Frames dropped because they do not decode to the schema.", "kind"),
    _gauge(
        "opd_teacher_held_tokens",
        "New tokens that wait for the end of their response because the prefix cache does not hold.",
    ),
    _gauge("opd_teacher_prefix_share", "Share of known prefixes that the engine still had in its cache.", "engine"),
    _gauge("opd_teacher_breaker_open", "1 while an engine is given no work because it failed.", "engine"),
    _counter("opd_teacher_retries_total", "Scoring batches that failed, to be sent again.", "kind"),
    _counter("opd_teacher_rerouted_chunks_total", "Chunks taken back from an engine that could not score them."),
    _counter("opd_teacher_canaries_total", "Test texts scored, by what they said of the engine.", "result"),
    _counter("opd_teacher_orphan_chunks_total", "Chunks dropped because the start of their sample never came."),
    _lag("teacher"),
    _counter("opd_intake_scored_tokens_total", "Scored tokens received, duplicates not counted."),
    _gauge("opd_intake_backlog_tokens", "Scored tokens that wait to be trained."),
    _counter("opd_intake_duplicates_total", "Chunks received more than once."),
    _strangers("intake"),
    _counter("opd_intake_malformed_total", "Frames dropped because they do not decode to the schema.", "kind"),
    _figure("opd_intake_reward_mean", "Mean reward of the responses that the last step completed."),
    _counter("opd_intake_steps_total", "Steps planned."),
    _counter("opd_intake_filtered_total", "Responses that `schedule.filter` kept from being trained."),
    _counter("opd_intake_cuts_total", "Responses trained in part because of a deadline."),
    _histogram("opd_intake_staleness_steps", "Age of each token when it is trained, in steps.", _STALENESS),
    _counter("opd_intake_recompute_tokens_total", "Tokens forwarded again as the prefix of a cut response."),
    _lag("intake"),
    _counter("opd_learner_steps_total", "Optimizer steps taken."),
    _counter("opd_learner_tokens_total", "Response tokens trained, over all data-parallel ranks."),
    _histogram("opd_learner_step_seconds", "Forward, backward and update of a step.", _SECONDS),
    _counter("opd_learner_idle_seconds_total", "Time spent waiting for a step's tokens."),
    _histogram("opd_learner_weight_sync_seconds", "Sending the weights to all engines.", _SECONDS),
    _figure("opd_learner_loss", "Loss of the last step, a mean over its tokens."),
    _figure("opd_learner_grad_norm", "Norm of the last step's gradient before clipping."),
    _figure("opd_learner_learning_rate", "Learning rate of the last step."),
    _figure(
        "opd_learner_reverse_kl",
        "KL(p ‖ q) of the present student p and the teacher q at the last step's prefixes, in nats: exact with "
        "`reverse_kl_full` and `minillm_full`, else estimated by the mean of p/mu (log p - log q) over the tokens that "
        "weights mu sampled.",
    ),
    _figure("opd_learner_ratio_std", "Root mean square of p/mu - 1 over the last step's sampled tokens."),
    _figure("opd_learner_clipped_share", "Share of the last step's tokens whose importance ratio was clipped."),
)
ROLES: tuple[str, ...] = tuple(dict.fromkeys(metric.role for metric in CATALOGUE))


class Histogram(Collector):
    """A histogram that takes many equal observations in one call, because a step's tokens have only a few ages."""

    def __init__(self, metric: Metric, registry: CollectorRegistry) -> None:
        self._metric = metric
        self._counts = [0.0] * (len(metric.buckets) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()  # the exporter reads from a thread of its own
        registry.register(self)

    def observe(self, value: float, count: float = 1) -> None:
        """Count `value` `count` times; O(log buckets) whatever the count."""
        with self._lock:
            self._counts[bisect_left(self._metric.buckets, value)] += count
            self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the cumulative buckets, as Prometheus wants them."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        bounds = [*(str(bound) for bound in self._metric.buckets), "+Inf"]
        cumulative = [(bound, sum(counts[: index + 1])) for index, bound in enumerate(bounds)]
        yield HistogramMetricFamily(self._metric.name, self._metric.help, buckets=cumulative, sum_value=total)


class Figure(Collector):
    """A gauge that may have no value. Without one, Prometheus sees no series."""

    def __init__(self, metric: Metric, registry: CollectorRegistry) -> None:
        self._metric = metric
        self._value: float | None = None
        registry.register(self)

    def set(self, value: float | None) -> None:
        """Set the value; None if it was not computed."""
        self._value = value

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the value, if there is one."""
        yield GaugeMetricFamily(self._metric.name, self._metric.help, value=self._value)


class RoleMetrics:
    """The metrics of one process, in a registry of their own: `metrics["opd_rollout_tokens_total"].inc(512)`.

    Counters and gauges are those of `prometheus_client`; histograms are `Histogram`, gauges without a value `Figure`.
    Safe to use from any thread.
    """

    def __init__(self, role: str) -> None:
        """`role` is one of `ROLES`; `KeyError` otherwise."""
        if role not in ROLES:
            raise KeyError(f"no metrics for {role!r}: the catalogue has {', '.join(ROLES)}")
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody reads
        self.registry = CollectorRegistry()
        self._role = role
        self._all = {metric.name: self._make(metric) for metric in CATALOGUE if metric.role == role}

    def __getitem__(self, name: str) -> Any:
        """Return the counter, gauge or histogram with this full name; `KeyError` if this role has none."""
        try:
            return self._all[name]
        except KeyError:
            raise KeyError(
                f"{name} is no metric of {self._role}: add it to the catalogue in opd_async.telemetry.metrics"
            ) from None

    @contextmanager
    def serve(self, host: str, port: int) -> Iterator[int]:
        """Answer Prometheus on http://host:port/metrics from a thread; yields the port, a free one for port 0.

        Raises `OpdError` if the port cannot be bound.
        """
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise OpdError(
                f"metrics of {self._role} cannot be served on {host}:{port}: {error.strerror}; "
                "end the process that holds the port, or choose another network.base_port"
            ) from error
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram | Figure:
        if metric.absent:
            return Figure(metric, self.registry)
        if metric.kind is MetricKind.HISTOGRAM:
            return Histogram(metric, self.registry)
        kind = Counter if metric.kind is MetricKind.COUNTER else Gauge
        return kind(metric.name, metric.help, metric.labels, registry=self.registry)


async def loop_lag(histogram: Histogram, interval_s: float = LAG_INTERVAL_S) -> None:
    """Measure how late this event loop wakes up, in seconds, until cancelled. On cancel: ends at once."""
    while True:
        start = time.perf_counter()
        await asyncio.sleep(interval_s)
        histogram.observe(max(0.0, time.perf_counter() - start - interval_s))


def write_targets(path: Path, targets: Mapping[str, str], teachers: Mapping[str, str] | None = None) -> None:
    """Write a service-discovery file for Prometheus (`file_sd_configs`), whole or not at all.

    `targets` maps process names to `host:port`; each becomes a target with the label `process`, and with the label
    `teacher` if `teachers` has one for it. Raises `OSError`.
    """
    of = teachers or {}
    entries = [
        {"targets": [address], "labels": {"process": name} | ({"teacher": of[name]} if name in of else {})}
        for name, address in targets.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)


def markdown() -> str:
    """Write the page docs/metrics.md."""
    parts = [_PAGE_HEAD]
    for role in ROLES:
        rows = [_row(metric) for metric in CATALOGUE if metric.role == role]
        parts.append("\n".join([f"## {role.capitalize()}", "", "| metric | kind | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _row(metric: Metric) -> str:
    labels = f"{{{', '.join(metric.labels)}}}" if metric.labels else ""
    buckets = f" Buckets {metric.buckets[0]:g} to {metric.buckets[-1]:g}." if metric.buckets else ""
    return f"| `{metric.name}{labels}` | {metric.kind.value} | {metric.help}{buckets} |"


_PAGE_HEAD = """\
# Metrics

Made by `python -m opd_async.telemetry.metrics` from the catalogue in its source; a test keeps this page equal to it.

Every process answers Prometheus on a port of its own with its role's metrics and no others; none of them carries a
prompt or a response. The run's folder holds `targets.json`, a file for Prometheus' `file_sd_configs` in which every
target has a `process` label (`rollout-0`, `learner-0`, ...), and the engines and actors of a teacher have a `teacher`
label. `dashboards/` has a Grafana dashboard."""


if __name__ == "__main__":
    print(markdown(), end="")
