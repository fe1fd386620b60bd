"""The hosts of a run as the launcher knows them, and which host may be one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from opd_async.config.clustering import ClusterSection
from opd_async.errors import RoleError
from opd_async.transport import messages as m


class HostLostError(RoleError):
    """The host that a process should be on is lost, and has not come back in time."""


@dataclass(slots=True, kw_only=True)
class Node:
    """One host, from the first time that its agent has joined."""

    name: str
    address: str
    incarnation: str
    route: bytes
    heard: float
    there: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while its agent is there."""
    looked_at: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by who sees whether it can be used."""
    shared: str = ""
    """The incarnation that has shown that it shares the launcher's files."""
    lost_for: str = ""
    """Why it was given up last."""
    drained: bool = False
    """It has left in order: an agent that is started there, as by Kubernetes, waits until it is wanted back."""
    ended: set[int] = field(default_factory=set)
    """Numbers of the ends that this incarnation has reported."""


def unfit(
    join: m.Join, nodes: Mapping[str, Node], versions: Mapping[str, str], cluster: ClusterSection, open_to_all: bool
) -> str | None:
    """Say why this host cannot serve the run; None if it can.

    `nodes` are those that have joined, `versions` the launcher's packages; not `open_to_all`: the run has begun, and
    takes back its own hosts only, for it has no seat left.
    """
    for package, mine in versions.items():
        theirs = join.versions.get(package, "none")
        if theirs != mine:
            return f"{join.host} has {package} {theirs}, the launcher's host {mine}; install the same on every host"
    node = nodes.get(join.host)
    if node is None and not open_to_all:
        return (
            f"{join.host} is no host of this run, which has {', '.join(nodes)}; it began without, and has no seat left "
            "(cluster.spare_nodes)"
        )
    successor = node is not None and (not node.there.is_set() or join.before == node.incarnation)
    if node is not None and successor and node.address != join.address:
        return f"{join.host} came back as {join.address}, and the run knows it as {node.address}; give it that again"
    if join.gpus < cluster.gpus_per_node:
        return (
            f"{join.host} has {join.gpus} GPUs, and cluster.gpus_per_node says {cluster.gpus_per_node}; "
            "write a smaller number, or see CUDA_VISIBLE_DEVICES there"
        )
    return None


def natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts `h2` before `h10`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
