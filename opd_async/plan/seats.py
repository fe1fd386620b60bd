"""Seats of a run: what a host that joins while it goes on brings, student engines and a rollout actor that drives them.

The names of a seat's processes are known to everybody from the start, who connects to whom only once it is taken
(`resolve.with_seat`). Prompts are dealt to teachers by a fixed rule, so that no teacher can join.
"""

from __future__ import annotations

from opd_async.config.topology import Topology
from opd_async.plan.placement import CUDA, Spot
from opd_async.plan.plan import RoleKind, role_name

Key = tuple[RoleKind, int]


def engines_of_seat(topology: Topology) -> int:
    """How many student engines one host has devices for."""
    cluster, section = topology.cluster, topology.engines.student
    devices = cluster.gpus_per_node if section.devices == (CUDA,) else cluster.slots_per_node
    return devices // section.tensor_parallel


def seat(topology: Topology, number: int) -> dict[Key, Spot]:
    """The processes of a seat, and the devices of each on its host, which is 1 here."""
    section, each = topology.engines.student, engines_of_seat(topology)
    size, kind, first = section.tensor_parallel, section.devices[0], section.replicas + number * each
    found: dict[Key, Spot] = {}
    for engine in range(each):
        devices = (kind,) * size
        if kind == CUDA:
            devices = tuple(f"cuda:{engine * size + i}" for i in range(size))
        found[RoleKind.STUDENT_ENGINE, first + engine] = Spot(1, devices)
    found[RoleKind.ROLLOUT, topology.rollout.replicas + number] = Spot(1, ("cpu",))
    return found


def reserved(topology: Topology) -> tuple[str, ...]:
    """The names of the processes of all seats."""
    seats = range(topology.cluster.spare_nodes)
    return tuple(role_name(kind, index) for number in seats for kind, index in seat(topology, number))
