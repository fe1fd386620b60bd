"""Check that a topology can be dealt out to the hosts of its cluster, and asks for nothing that takes one host."""

from __future__ import annotations

from collections.abc import Iterator

from opd_async.cluster.allocation import find_allocation
from opd_async.config.topology import Backend, NetworkSection, Topology
from opd_async.errors import InputError
from opd_async.plan.placement import CPU, CUDA, place
from opd_async.plan.seats import engines_of_seat


def cluster_problems(topology: Topology) -> Iterator[str]:
    """List every reason why the run cannot be on the hosts of `cluster`, or needs hosts that it has not."""
    cluster, student = topology.cluster, topology.engines.student
    if topology.on_one_host:
        yield from _local_problems(topology)
        return
    if cluster.backend is Backend.RAY and "nodes" not in cluster.model_fields_set:
        yield "cluster.nodes: left out; write how many nodes of the Ray cluster the run takes, with the launcher's"
    if cluster.backend is Backend.SLURM:
        yield from _slurm_problems(topology)
    if cluster.spare_nodes and (not student.started or student.router is not None):
        yield (
            "cluster.spare_nodes: a host that joins brings student engines, and engines.student starts none by itself "
            "or is behind a router; write 0"
        )
    elif cluster.spare_nodes and not engines_of_seat(topology):
        yield (
            f"cluster.spare_nodes: a host has no devices for an engine of {student.tensor_parallel} "
            "(engines.student.tensor_parallel); write 0, or a smaller one"
        )
    if cluster.lost_s <= cluster.fence_s:
        yield (
            f"cluster.lost_s: {cluster.lost_s:g} s, and a host ends its processes only after fence_s "
            f"{cluster.fence_s:g} s,"
            f" so they could run twice; write more than {cluster.fence_s:g}"
        )
    if topology.network.bind != NetworkSection().bind:
        yield (
            f"network.bind: {topology.network.bind}, but on several hosts each process listens on its own host's "
            "address; remove it, and write cluster.interface"
        )
    if topology.shared_devices:
        yield "shared_devices: on several hosts the placement deals the devices out, each once; remove it"
    if topology.learner.weight_transport == "tensor":
        yield (
            "learner.weight_transport: tensor needs engines on the learner's own GPU; write broadcast, or disk on a "
            "shared file system"
        )
    wrong = [(path, devices) for path, devices in _devices(topology) if devices not in ((CPU,), (CUDA,))]
    for path, devices in wrong:
        yield (
            f"{path}: {', '.join(devices)}, but on several hosts the placement chooses; write "
            f"[{devices[0][:4].rstrip(':')}]"
        )
    if not wrong:
        try:
            place(topology)
        except InputError as error:
            yield str(error)


def _slurm_problems(topology: Topology) -> Iterator[str]:
    hosts, allocation = topology.cluster.nodes, find_allocation()
    if "nodes" not in topology.cluster.model_fields_set:
        yield (
            "cluster.nodes: left out, and no Slurm allocation is here to say how many there are; write it, or call "
            "this inside of sbatch or salloc"
        )
    elif allocation is not None and (problem := allocation.too_few_for(hosts)):
        yield problem


def _local_problems(topology: Topology) -> Iterator[str]:
    if topology.cluster.nodes > 1:
        nodes = topology.cluster.nodes
        yield f"cluster.nodes: {nodes}, but backend: local is one host; write backend: agents, or nodes: 1"
    for path, devices in _devices(topology):
        if CUDA in devices:
            yield f"{path}: cuda without a number is for several hosts (cluster.backend); write cuda:0, or another one"


def _devices(topology: Topology) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "learner.devices", topology.learner.devices
    for side, _, section in topology.engine_sides:
        if section.started:
            yield f"engines.{side}.devices", section.devices
