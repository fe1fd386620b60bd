"""Figures of the host that a process is on: processors, memory, and GPUs where NVIDIA's NVML answers.

    RoleMetrics("host")          an agent, for its host
    HostCollector(registry)      the launcher, for its own

Read when Prometheus asks. NVML is that of the package `nvidia-ml-py` (extra `nvml`; SGLang brings it); without it, and
without a driver, the GPUs' metrics have no series.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from opd_async.telemetry.metrics import CATALOGUE, Metric, MetricKind

NOT_BUSY = ("idle", "iowait", "guest", "guest_nice")
"""Of the modes of a processor's time. That of guests is counted as the user's too."""
Values = dict[str, list[tuple[list[str], float]]]
"""By metric: the values of its labels, and its own."""


class HostCollector(Collector):
    """The metrics `opd_host_...` of the catalogue."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._metrics = [metric for metric in CATALOGUE if metric.role == "host"]
        self._nvml = _nvml()
        registry.register(self)

    def describe(self) -> Iterator[Family]:
        """Yield the families, without asking the host."""
        yield from (_family(metric) for metric in self._metrics)

    def collect(self) -> Iterator[Family]:
        """Yield what the host is at now."""
        values = {**host_values(), **gpu_values(self._nvml)}
        for metric in self._metrics:
            family = _family(metric)
            for labels, value in values.get(metric.name, ()):
                family.add_metric(labels, value)
            yield family


def _family(metric: Metric) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if metric.kind is MetricKind.COUNTER else GaugeMetricFamily
    return kind(metric.name, metric.help, labels=list(metric.labels))


def host_values() -> Values:
    """Processors and memory, of the whole host and not of a container on it."""
    times, memory = psutil.cpu_times()._asdict(), psutil.virtual_memory()
    found = {
        "opd_host_busy_seconds_total": sum(seconds for mode, seconds in times.items() if mode not in NOT_BUSY),
        "opd_host_cores": float(psutil.cpu_count() or 1),
        "opd_host_memory_bytes": float(memory.total),
        "opd_host_memory_available_bytes": float(memory.available),
    }
    return {name: [([], value)] for name, value in found.items()}


def gpu_values(nvml: Any) -> Values:
    """Memory and utilisation of every GPU, by its index; what one of them does not tell is left out."""
    found: Values = {}
    if nvml is None:
        return found

    def add(name: str, gpu: int, value: float) -> None:
        found.setdefault(f"opd_host_gpu_{name}", []).append(([str(gpu)], value))

    with contextlib.suppress(nvml.NVMLError):
        for gpu in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(gpu)
            with contextlib.suppress(nvml.NVMLError):
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                add("memory_bytes", gpu, float(memory.total))
                add("memory_used_bytes", gpu, float(memory.used))
            with contextlib.suppress(nvml.NVMLError):
                add("busy_share", gpu, nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    return found


def _nvml() -> Any:
    """NVML, ready to be asked; None where it does not answer."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # no package, no library, no driver: whatever it is, there is nothing to show
        return None
    return nvml
