"""Check a topology against this machine: each device is given out once, each port can be bound."""

from __future__ import annotations

import ipaddress
import resource
from collections.abc import Iterator

from opd_async.config.topology import Topology
from opd_async.plan.free_ports import unusable
from opd_async.plan.resolve import LAST_PORT, port_keys, ports_of_seat, rank_devices, replica_devices
from opd_async.process import MOST_OPEN_FILES

OTHER_FILES = 256
"""Files, sockets and libraries that a role holds open beside its responses."""


def device_problems(topology: Topology) -> Iterator[str]:
    """List devices that do not fit replicas and ranks, and accelerators given out twice; `cpu` may be shared."""
    if not topology.on_one_host:
        return  # the placement deals them out (`opd_async.checks.cluster`)
    users: dict[str, list[tuple[str, str]]] = {}
    for side, _, section in topology.engine_sides:
        if not section.started:
            continue
        wanted = section.replicas * section.tensor_parallel
        if len(section.devices) not in (1, wanted):
            each = "one for each" if section.tensor_parallel == 1 else f"{section.tensor_parallel} for each"
            yield (
                f"engines.{side}.devices: {len(section.devices)} devices for {section.replicas} replicas; write "
                f"{each}, or one for all"
            )
        for index, devices in enumerate(replica_devices(section)):
            for device in devices:
                users.setdefault(device, []).append((f"engines.{side}.devices", f"{side}-engine-{index}"))
    ranks, devices = topology.learner.ranks, rank_devices(topology)
    if len(devices) != ranks:
        yield (
            f"learner.devices: {len(devices)} devices for {ranks} ranks (tensor x pipeline x data parallel); "
            "write one for each rank, or cpu for all"
        )
    for rank, device in enumerate(devices):
        users.setdefault(device, []).append(("learner.devices", f"learner rank {rank}"))
    # handles to the learner's memory need the learner's device
    shared = topology.learner.devices[0] if topology.learner.weight_transport == "tensor" else "cpu"
    for device, owners in users.items():
        if device == shared:
            owners = [owner for owner in owners if owner[0] != "engines.student.devices"]
        if device not in ("cpu", *topology.shared_devices) and len(owners) > 1:
            names = ", ".join(name for _, name in owners)
            yield (
                f"{owners[-1][0]}: {device} is given to {names}; write another device for all but one of them, or list "
                "it in shared_devices"
            )


def network_problems(topology: Topology) -> Iterator[str]:
    """List an address off loopback, and each explicit port that cannot be bound, with the role that wants the port."""
    network = topology.network
    if topology.on_one_host and not _is_loopback(network.bind):
        yield (
            f"network.bind: {network.bind} is not an IPv4 loopback address; write 127.0.0.1, or run on several hosts "
            "(docs/cluster.md)"
        )
    elif network.base_port:
        keys = port_keys(topology)
        count = len(keys) + topology.cluster.spare_nodes * ports_of_seat(topology)
        if network.base_port + count - 1 > LAST_PORT:
            yield f"network.base_port: {network.base_port} and {count} ports pass {LAST_PORT}; write a smaller one"
            return
        for port, (role, purpose) in enumerate(keys if topology.on_one_host else (), network.base_port):
            if reason := unusable(network.bind, port):
                yield (
                    f"network.base_port: port {port}, which {role} wants for {purpose}, {reason}; write a base_port "
                    f"with {len(keys)} free ports after it, or 0 to take free ones"
                )


def open_file_problems(topology: Topology) -> Iterator[str]:
    """List what needs more open files than a process may have: each running response is a connection.

    Any one actor may have to hold all of them, when the others have died. Roles raise their own limit to the hard one.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    slots = topology.rollout.slots
    if slots + OTHER_FILES > most:
        yield (
            f"rollout.slots: {slots} responses at once need {slots + OTHER_FILES} open files in one process, which may "
            f"have {most} here (ulimit -Hn); write at most {max(most - OTHER_FILES, 1)}, or have the limit raised"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False
