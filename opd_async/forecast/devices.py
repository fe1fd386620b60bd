"""Devices and links that a topology can be planned for: peaks of data sheets, or of this host as it is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

GIGA, TERA = 1e9, 1e12
CPU = "cpu"
"""Name of this host's cores, whose figures are measured when they are asked for."""
_MATRIX, _COPIED, _TRIES = 768, 1 << 26, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """An accelerator: peak dense operations a second in bfloat16 and in float32, bytes a second, memory in bytes, and
    the shares of the peaks that well-kept software reaches in decoding (memory), prefill and training (operations)."""

    name: str
    flops: float
    float32_flops: float
    bandwidth: float
    memory: float
    decode_share: float = 0.75
    prefill_share: float = 0.5
    train_share: float = 0.4
    shared: bool = False
    """All roles of the run share one of these: each process has its part."""

    def flops_in(self, dtype: str) -> float:
        """Peak operations a second in a dtype, `float32` without TF32."""
        return self.float32_flops if dtype == "float32" else self.flops

    def part(self, processes: int) -> Device:
        """What one of `processes` has of a device that they share; the device itself where they do not."""
        if not self.shared:
            return self
        figures = ("flops", "float32_flops", "bandwidth", "memory")
        return replace(self, **{name: getattr(self, name) / processes for name in figures})


def _sheet(name: str, bfloat16: float, float32: float, bandwidth: float, memory: float) -> Device:
    """A device from its data sheet: tera-operations, terabytes a second, gigabytes."""
    return Device(
        name=name,
        flops=bfloat16 * TERA,
        float32_flops=float32 * TERA,
        bandwidth=bandwidth * TERA,
        memory=memory * GIGA,
    )


A100 = _sheet("A100", 312, 19.5, 2.039, 80)
B200 = _sheet("B200", 2250, 75, 8.0, 180)
H100 = _sheet("H100", 989, 67, 3.35, 80)
H200 = _sheet("H200", 989, 67, 4.8, 141)
L40S = _sheet("L40S", 362, 91.6, 0.864, 48)
MI300X = _sheet("MI300X", 1307, 163.4, 5.3, 192)
RTX4090 = _sheet("RTX4090", 165.2, 82.6, 1.008, 24)
DEVICES = {device.name: device for device in (A100, B200, H100, H200, L40S, MI300X, RTX4090)}


def device_named(name: str) -> Device:
    """A device of `DEVICES`, or this host's cores for `cpu`, which takes a second to measure. `KeyError` for others."""
    return _this_host() if name == CPU else DEVICES[name]


def _this_host() -> Device:
    """All cores of this host, as numpy uses them: products of matrices, and copies of memory, while nothing else runs.

    bfloat16 counts as fast as float32: few CPUs have instructions for it.
    """
    left = np.random.default_rng(0).random((_MATRIX, _MATRIX), np.float32)
    source, target = np.zeros(_COPIED, np.uint8), np.empty(_COPIED, np.uint8)
    flops = 2 * _MATRIX**3 / _seconds(lambda: left @ left)
    return Device(
        name=f"{os.cpu_count()} cores of this host",
        flops=flops,
        float32_flops=flops,
        bandwidth=2 * _COPIED / _seconds(lambda: np.copyto(target, source)),
        memory=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        shared=True,
    )


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of a few tries."""
    times = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


@dataclass(frozen=True, slots=True)
class Link:
    """A way for weights from learner to engines: bytes per second and the share that a broadcast reaches."""

    name: str
    bandwidth: float
    share: float = 0.8


NVLINK = Link("NVLink", 450e9)
NETWORK_400G = Link("400G", 50e9)
PCIE = Link("PCIe", 25e9)
LINKS = {link.name: link for link in (NVLINK, NETWORK_400G, PCIE)}
