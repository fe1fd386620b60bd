"""What is exported of a host: by its agent, and by the launcher of its own; GPUs where NVML answers."""

from __future__ import annotations

import socket
import urllib.request
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from deadlines import patience
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from opd_async.agent import metrics_served
from opd_async.plan.free_ports import free_ports
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.telemetry.host import HostCollector, gpu_values


def found(text: str) -> dict[str, float]:
    """Value by name."""
    return {sample.name: sample.value for f in text_string_to_metric_families(text) for sample in f.samples}


def test_an_agent_serves_its_host_and_its_own_process() -> None:
    (port,) = free_ports("127.0.0.1", 1)
    said: list[str] = []
    url = f"http://127.0.0.1:{port}/metrics"
    with metrics_served("127.0.0.1", port, said.append), urllib.request.urlopen(url, timeout=patience(30)) as reply:
        values = found(reply.read().decode())
    assert values["opd_host_memory_bytes"] == psutil.virtual_memory().total > values["opd_host_memory_available_bytes"]
    assert values["opd_host_cores"] == psutil.cpu_count()
    assert 0 < values["opd_host_busy_seconds_total"] <= sum(psutil.cpu_times())
    assert values["process_resident_memory_bytes"] > 1e6 and said == []


def test_a_taken_port_is_said_and_ends_nothing() -> None:
    said: list[str] = []
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, metrics_served("127.0.0.1", taken.getsockname()[1], said.append):
        pass
    assert len(said) == 1 and said[0].startswith("warning: no metrics of this host: metrics of host cannot be served")


def test_the_launcher_has_the_figures_of_its_host_beside_its_own() -> None:
    metrics = RoleMetrics("launcher")
    HostCollector(metrics.registry)
    values = found(generate_latest(metrics.registry).decode())
    assert values["opd_host_cores"] == psutil.cpu_count() and "opd_launcher_step" in values


class Nvml:
    """Two GPUs, of which the second tells nothing but its memory."""

    class NVMLError(Exception):
        """What NVML raises."""

    def __init__(self, count: int = 2) -> None:
        self._count = count

    def nvmlDeviceGetCount(self) -> int:
        if self._count < 0:
            raise self.NVMLError
        return self._count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=80 << 30, used=(handle + 1) << 30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle == 1:
            raise self.NVMLError
        return SimpleNamespace(gpu=25)


def test_what_a_gpu_does_not_tell_is_left_out() -> None:
    values = gpu_values(Nvml())
    assert values["opd_host_gpu_memory_used_bytes"] == [(["0"], float(1 << 30)), (["1"], float(2 << 30))]
    assert values["opd_host_gpu_memory_bytes"] == [(["0"], float(80 << 30)), (["1"], float(80 << 30))]
    assert values["opd_host_gpu_busy_share"] == [(["0"], 0.25)]


@pytest.mark.parametrize("nvml", [None, Nvml(0), Nvml(-1)])
def test_a_host_without_gpus_has_no_series_of_them(nvml: Any) -> None:
    assert gpu_values(nvml) == {}
