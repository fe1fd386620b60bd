"""Export a process's metrics to Prometheus, as the catalogue declares them.

Each process exports its own role's metrics and nothing else; which process a series comes from is in the `process`
label that `write_targets` gives to Prometheus.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics, start_http_server
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from opd_async.errors import OpdError
from opd_async.telemetry.metrics import CATALOGUE, ROLES, Metric, MetricKind

LAG_INTERVAL_S = 0.05


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
