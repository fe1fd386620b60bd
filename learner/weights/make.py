"""The weight transport that a topology asks for (`learner.weight_transport`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._C._distributed_c10d import TCPStore

from opd_async.learner.distributed.cpu import this_device
from opd_async.learner.hf.io import hf_specs
from opd_async.learner.model.decoder import DecoderModel
from opd_async.learner.weights.base import WeightTransport
from opd_async.learner.weights.broadcast import WeightSender
from opd_async.learner.weights.engine_http import EngineAddress
from opd_async.learner.weights.group import open_store
from opd_async.learner.weights.local import DiskSender, TensorSender
from opd_async.plan.plan import Plan, RoleKind

MIB = 1 << 20
FOLDER = "weights"
"""Below the run's folder: where weights lie that travel by disk."""


class Transports:
    """Makes the transports of one learner process, one after the other: their groups meet at one port of the plan."""

    def __init__(self, plan: Plan, model: DecoderModel) -> None:
        self._plan, self._model = plan, model
        self._store: TCPStore | None = None

    def to(self, urls: Sequence[str]) -> WeightTransport:
        """A transport to the engines at `urls`, not connected yet.

        Raises `WeightSyncError` where another program has the port.
        """
        topology = self._plan.topology
        section, learner = topology.engines.student, topology.learner
        timeout_s = topology.supervisor.heartbeat_deadline_s
        engines = [EngineAddress(url, section.admin_api_key or section.api_key, section.api_key) for url in urls]
        match learner.weight_transport:
            case "tensor":
                return TensorSender(engines, bucket_bytes=learner.bucket_mib * MIB, timeout_s=timeout_s)
            case "disk":
                return DiskSender(
                    engines,
                    folder=self._plan.run_folder / FOLDER,
                    source=topology.models.student.path,
                    specs=hf_specs(self._model),
                    dtype=getattr(torch, section.dtype),
                    timeout_s=timeout_s,
                )
        device = this_device()
        if self._store is None:
            mine = self._plan.role(RoleKind.LEARNER, 0)
            self._store = open_store(mine.host, timeout_s, mine.ports["weights"])
        return WeightSender(
            engines,
            backend="nccl" if device.type == "cuda" else "gloo",
            store=self._store,
            bucket_bytes=learner.bucket_mib * MIB,
            timeout_s=timeout_s,
            device=device,
        )
