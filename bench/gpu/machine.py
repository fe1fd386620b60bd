"""What this machine is: GPUs and driver, versions, the signature of the attention kernel.

python -m bench.gpu.machine [--json FILE]
"""

from __future__ import annotations

import inspect
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from opd_async.bench.gpu.found import Findings, device, end, parse, parser

PACKAGES = ("torch", "megatron-core", "transformers", "safetensors", "numpy", "pyzmq", "triton", "transformer-engine")
QUERY_S = 30.0


def gpus() -> list[dict[str, Any]]:
    """Name, memory in GiB, compute capability and multiprocessors of each GPU."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        one = torch.cuda.get_device_properties(index)
        capability = f"{one.major}.{one.minor}"
        memory = round(one.total_memory / (1 << 30), 1)
        found.append({"name": one.name, "gib": memory, "capability": capability, "sms": one.multi_processor_count})
    return found


def driver() -> str:
    """Version of the driver, as nvidia-smi says it; empty without one."""
    if (command := shutil.which("nvidia-smi")) is None:
        return ""
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=QUERY_S, check=False)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def versions() -> dict[str, str]:
    """Of the packages that matter here; those that are not installed are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def fingerprint() -> str:
    """What results of another machine or another torch must not be mixed with."""
    names = sorted(str(gpu["name"]) for gpu in gpus()) or [f"CPU {platform.machine()}"]
    return f"{', '.join(names)}; torch {torch.__version__}; CUDA {torch.version.cuda}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Record everything; the one check is a product of two matrices on the device."""
    options = parse(parser("What this machine is."), arguments)
    findings = Findings(options.json)
    findings.figure("fingerprint", fingerprint())
    findings.figure("gpus", gpus())
    findings.figure("driver", driver())
    findings.figure("python", platform.python_version())
    findings.figure("cpus", len(os.sched_getaffinity(0)))
    findings.figure("versions", versions())
    if torch.cuda.is_available():
        findings.figure("nccl", ".".join(map(str, torch.cuda.nccl.version())))
    from torch.nn.attention.varlen import varlen_attn

    findings.figure("varlen_attn", str(inspect.signature(varlen_attn)))
    left = torch.arange(64.0, device=device()).reshape(8, 8)
    findings.check(
        "a product of matrices", float((left @ left - (left.cpu() @ left.cpu()).to(left.device)).abs().max()), 0
    )
    end(findings)


if __name__ == "__main__":
    main()
