"""Where the metrics of a run's processes are, and by which labels Prometheus tells them apart."""

from __future__ import annotations

import socket

from opd_async.plan.plan import Plan, RoleKind

AGENT = "agent"
LAUNCHER = "launcher"


def scrape_targets(plan: Plan) -> dict[str, str]:
    """The `host:port` of every process that serves metrics, by its name; of the learner's ranks the first one does.

    Agents are among them: they serve at `cluster.port` of their own hosts.
    """
    serving = [role for role in plan.roles if role.kind is not RoleKind.LEARNER or role.index == 0]
    targets = {role.name: f"{role.host}:{role.ports['metrics']}" for role in serving}
    targets |= {f"{AGENT}-{name}": f"{host}:{plan.topology.cluster.port}" for name, host in _hosts(plan).items()}
    return targets | {LAUNCHER: f"{plan.launcher_host}:{plan.launcher_metrics_port}"}


def _hosts(plan: Plan) -> dict[str, str]:
    """The address of each host with an agent, by its name."""
    return {role.node: role.host for role in plan.roles if role.node}


def scrape_labels(plan: Plan) -> dict[str, dict[str, str]]:
    """The labels `role`, `host` and, where it is one teacher's, `teacher` of every process, by its name."""
    here = socket.gethostname()
    labels = {role.name: {"role": role.kind.value, "host": role.node or here} for role in plan.roles}
    for role in plan.roles:
        if role.teacher:
            labels[role.name]["teacher"] = role.teacher
    labels |= {f"{AGENT}-{name}": {"role": AGENT, "host": name} for name in _hosts(plan)}
    return labels | {LAUNCHER: {"role": LAUNCHER, "host": here}}
