"""The weight transport that a topology asks for (`learner.weight_transport`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opd_async.learner.distributed.cpu import this_device
from opd_async.learner.hf.io import hf_specs
from opd_async.learner.model.decoder import DecoderModel
from opd_async.learner.weights.base import WeightTransport
from opd_async.learner.weights.broadcast import WeightSender
from opd_async.learner.weights.engine_http import EngineAddress
from opd_async.learner.weights.local import DiskSender, TensorSender
from opd_async.plan.plan import Plan, RoleKind

MIB = 1 << 20
FOLDER = "weights"
"""Below the run's folder: where weights lie that travel by disk."""


def make_transport(plan: Plan, urls: Sequence[str], model: DecoderModel) -> WeightTransport:
    """A transport to the engines at `urls`, not connected yet."""
    topology = plan.topology
    section, learner, timeout_s = topology.engines.student, topology.learner, topology.supervisor.heartbeat_deadline_s
    engines = [EngineAddress(url, section.admin_api_key or section.api_key, section.api_key) for url in urls]
    match learner.weight_transport:
        case "tensor":
            return TensorSender(engines, bucket_bytes=learner.bucket_mib * MIB, timeout_s=timeout_s)
        case "disk":
            return DiskSender(
                engines,
                folder=plan.run_folder / FOLDER,
                source=topology.models.student.path,
                specs=hf_specs(model),
                dtype=getattr(torch, section.dtype),
                timeout_s=timeout_s,
            )
    device = this_device()
    return WeightSender(
        engines,
        backend="nccl" if device.type == "cuda" else "gloo",
        bind_host=plan.role(RoleKind.LEARNER, 0).host,
        bucket_bytes=learner.bucket_mib * MIB,
        timeout_s=timeout_s,
        device=device,
    )
