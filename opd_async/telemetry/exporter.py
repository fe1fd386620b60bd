"""Export a process's metrics to Prometheus, as the catalogue declares them.

Each process exports its own role's metrics, and what the kernel says of the process; which process and which run a
series comes from is in the labels `process` and `run` that `write_targets` gives to Prometheus.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client import Metric as Family
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from opd_async.errors import OpdError
from opd_async.telemetry.host import HostCollector
from opd_async.telemetry.kept_counters import (
    Values,
    bucket_counts,
    read_counters,
    series_key,
    series_of,
    write_counters,
)
from opd_async.telemetry.metrics import CATALOGUE, ROLES, Feature, Metric, MetricKind

LAG_INTERVAL_S = 0.05


class Histogram(Collector):
    """A histogram that takes many equal observations in one call, because a step's tokens have only a few ages."""

    def __init__(self, metric: Metric, registry: CollectorRegistry) -> None:
        self._metric = metric
        self._bounds = [*(str(bound) for bound in metric.buckets), "+Inf"]
        self._counts = [0.0] * len(self._bounds)
        self._sum = 0.0
        self._lock = threading.Lock()  # the exporter reads from a thread of its own
        registry.register(self)

    def go_on(self, values: Values) -> None:
        """Begin with what an earlier process had counted in the same buckets."""
        counts = bucket_counts(values, self._metric.name, self._bounds)
        if counts is not None:
            with self._lock:
                self._counts = counts
                self._sum = values.get(series_key(f"{self._metric.name}_sum", {}), 0.0)

    def observe(self, value: float, count: float = 1) -> None:
        """Count `value` `count` times; O(log buckets) whatever the count."""
        with self._lock:
            self._counts[bisect_left(self._metric.buckets, value)] += count
            self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Yield the cumulative buckets, as Prometheus wants them."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        cumulative = list(zip(self._bounds, accumulate(counts), strict=True))
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


class _Registry(CollectorRegistry):
    """Writes the counters down when somebody asks for them."""

    path: Path | None = None
    _writing = threading.Lock()

    def collect(self) -> Iterator[Family]:
        """Yield every family, those of the process too."""
        families = list(super().collect())
        if self.path is not None:
            with self._writing:  # two may ask at once
                write_counters(self.path, families)
        yield from families


class RoleMetrics:
    """The metrics of one process, in a registry of their own: `metrics["opd_rollout_tokens_total"].inc(512)`.

    Counters and gauges are those of `prometheus_client`; histograms are `Histogram`, gauges without a value `Figure`.
    Safe to use from any thread.
    """

    def __init__(
        self, role: str, features: Collection[Feature] = tuple(Feature), counters_file: Path | None = None
    ) -> None:
        """`role` is one of `ROLES`; `KeyError` otherwise. Metrics that need other `features` get no series.

        Counters go on from `counters_file`, and are written there whenever they are read.
        """
        if role not in ROLES:
            raise KeyError(f"no metrics for {role!r}: the catalogue has {', '.join(ROLES)}")
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody reads
        self.registry = _Registry()
        ProcessCollector(registry=self.registry)
        self._role = role
        self._features = frozenset(features)
        self._silent = CollectorRegistry()
        """Holds the metrics of what the run does not do: they can be set, and nobody reads them."""
        if role == "host":
            HostCollector(self.registry)
        made = [metric for metric in CATALOGUE if metric.role == role != "host"]
        self._all = {metric.name: self._make(metric) for metric in made}
        for metric in CATALOGUE:
            if metric.role == role and metric.begins:
                self.begin(metric.name, metric.begins)
        if counters_file is not None:
            self._go_on(read_counters(counters_file))
            self.registry.path = counters_file

    def begin(self, name: str, values: Collection[str]) -> None:
        """Have a counter's series from the start, at 0, for these values of its label."""
        for value in values:
            self[name].labels(value)

    def _go_on(self, values: Values) -> None:
        """Take over what an earlier process of this name had counted."""
        for metric in CATALOGUE:
            one = self._all.get(metric.name)
            if isinstance(one, Histogram):
                one.go_on(values)
            elif isinstance(one, Counter):
                for labels, value in series_of(values, metric.name):
                    if set(labels) == set(metric.labels):
                        (one.labels(**labels) if labels else one).inc(value)

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
            list(self.registry.collect())  # what was counted since the last scrape is kept too

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram | Figure:
        registry = self.registry if metric.needs is None or metric.needs in self._features else self._silent
        if metric.absent:
            return Figure(metric, registry)
        if metric.kind is MetricKind.HISTOGRAM:
            return Histogram(metric, registry)
        kind = Counter if metric.kind is MetricKind.COUNTER else Gauge
        return kind(metric.name, metric.help, metric.labels, registry=registry)


async def loop_lag(histogram: Histogram, interval_s: float = LAG_INTERVAL_S) -> None:
    """Measure how late this event loop wakes up, in seconds, until cancelled. On cancel: ends at once."""
    while True:
        start = time.perf_counter()
        await asyncio.sleep(interval_s)
        histogram.observe(max(0.0, time.perf_counter() - start - interval_s))


def write_targets(path: Path, targets: Mapping[str, str], labels: Mapping[str, Mapping[str, str]], run: str) -> None:
    """Write a service-discovery file for Prometheus (`file_sd_configs`), whole or not at all.

    `targets` maps process names to `host:port`; each becomes a target with the labels `process`, `run`, and what
    `labels` has of it by name. Raises `OSError`.
    """
    entries = [
        {"targets": [address], "labels": {"process": name, "run": run, **labels.get(name, {})}}
        for name, address in targets.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)
