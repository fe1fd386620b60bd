"""Plans of small runs on several hosts, with made-up addresses and ports."""

from __future__ import annotations

from pathlib import Path

from small_runs import small_topology

from opd_async.config.topology import Topology
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import Site, make_plan, ports_wanted


def plan_of(topology: Topology) -> Plan:
    """Its plan on hosts with made-up ports."""
    nodes = range(topology.cluster.nodes)
    ports = tuple(
        tuple(range(1000 * host, 1000 * host + count)) for host, count in enumerate(ports_wanted(topology), 1)
    )
    names = tuple(f"h{number}" if number else "" for number in nodes)
    return make_plan(topology, None, Site(names=names, addresses=tuple(f"10.0.0.{n}" for n in nodes), ports=ports))


def on_hosts(root: Path, nodes: int, slots: int, *overrides: str) -> Topology:
    """A small topology on so many hosts, each with so many CPU slots."""
    cluster = ("cluster.backend=agents", f"cluster.nodes={nodes}", f"cluster.slots_per_node={slots}")
    return small_topology(root, *cluster, *overrides)


def nodes_of(plan: Plan, kind: RoleKind = RoleKind.LEARNER) -> list[str]:
    """The hosts of the processes of a kind, in their order; empty for the launcher's."""
    return [role.node for role in plan.of_kind(kind)]
