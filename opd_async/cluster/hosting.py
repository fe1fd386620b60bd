"""Have the hosts of a run ready before its plan is made: agents joined, files shared, ports found.

hosted: secret, own address -> agents join -> one folder for all -> free ports -> Plan, and who starts its processes
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from opd_async.cluster.agent import first
from opd_async.cluster.agents import ASK_S, Agents
from opd_async.cluster.hosts import Hosts
from opd_async.cluster.interfaces import Face, own_face
from opd_async.cluster.nodes import Node
from opd_async.cluster.ray_nodes import RayAgents
from opd_async.cluster.slurm import SlurmAgents
from opd_async.cluster.starting import ByOthers, Starter
from opd_async.cluster.supervisor import Supervising, Supervisor
from opd_async.config.topology import Backend, Topology
from opd_async.data.hub import is_cached_model
from opd_async.errors import InputError, OpdError, RoleError
from opd_async.files import write_atomically
from opd_async.plan.free_ports import free_ports, unusable
from opd_async.plan.placement import describe_hosts
from opd_async.plan.plan import Plan
from opd_async.plan.resolve import Site, make_plan, ports_by_host, ports_wanted
from opd_async.transport import messages as m

Supervise = Callable[[Callable[[str], None], float, Callable[[int], None]], AbstractAsyncContextManager[Supervising]]
"""Makes what starts the processes of a run, of: echo, stop deadline in seconds, who is told of unwritten log lines."""
FETCH_S = 3600.0
"""Deadline of a host that may have to fetch models of the hub."""
SAME = ("opd_async", "torch", "megatron-core", "nvidia-nccl-cu12", "nvidia-nccl-cu13")


def versions() -> dict[str, str]:
    """The version of each package that has to be the same on every host, where it is installed."""
    found = {}
    for package in SAME:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def alone(echo: Callable[[str], None], stop_deadline_s: float, on_unwritten: Callable[[int], None]) -> Supervisor:
    """Make the supervisor of a run on one host."""
    return Supervisor(echo, stop_deadline_s, on_unwritten=on_unwritten)


@asynccontextmanager
async def hosted(
    topology: Topology, claims: ExitStack, say: Callable[[str], None]
) -> AsyncIterator[tuple[Plan, Supervise]]:
    """Give the plan of a run, and what starts its processes, while the agents of its hosts are there.

    Ports of this host stay claimed until `claims` is closed. Raises `InputError` for what is wrong with secret,
    interface, ports or files of any host, `DeadlineError` when agents do not join. On cancel: agents are let go.
    """
    if topology.on_one_host:
        yield make_plan(topology, claims), alone
        return
    cluster, stop_deadline_s = topology.cluster, topology.supervisor.stop_deadline_s
    starter, face = starter_of(topology, say), own_face(cluster.interface)
    if reason := unusable(face.address, cluster.port):
        raise InputError(
            f"cluster.port: {cluster.port} of {face.address} {reason}; write another one, here and in every agent's "
            "--join"
        )
    async with starter, Agents(cluster, stop_deadline_s, starter.keys, face, versions(), say=say) as agents:
        starter.begin(f"{face.address}:{cluster.port}")
        nodes: list[Node] = await first(agents.gather(starter.awaited), starter.broken())
        agents.on_missed = starter.lost
        await share_files(topology, agents, nodes, say)
        site = await _site(topology, agents, nodes, face, claims)
        plan = make_plan(topology, claims, site)
        say(
            describe_hosts(
                topology, [f"{socket.gethostname()} {face.address}", *(f"{n.name} {n.address}" for n in nodes)]
            )
        )

        def supervise(
            echo: Callable[[str], None], stop_deadline_s: float, on_unwritten: Callable[[int], None]
        ) -> AbstractAsyncContextManager[Supervising]:
            return Hosts(
                agents,
                alone(echo, stop_deadline_s, on_unwritten),
                where={role.name: role.node for role in plan.roles},
                environment=cluster.env,
                own_environment=face.environment,
                node_back_s=cluster.node_back_s,
                share=lambda node: share_files(topology, agents, [node], echo),
                echo=echo,
                on_unwritten=on_unwritten,
            )

        yield plan, supervise


def starter_of(topology: Topology, say: Callable[[str], None]) -> Starter:
    """Choose how agents get onto the hosts. Raises `InputError` where that cannot be done from here."""
    match topology.cluster.backend:
        case Backend.SLURM:
            return SlurmAgents(topology.cluster, say)
        case Backend.RAY:
            return RayAgents(topology.cluster, say)
        case _:
            return ByOthers()


async def _site(topology: Topology, agents: Agents, nodes: list[Node], face: Face, claims: ExitStack) -> Site:
    """The hosts with ports of their own, found by each agent on its host."""
    wanted, fixed = ports_wanted(topology), ports_by_host(topology)
    for port in fixed[0]:
        if reason := unusable(face.address, port):
            raise InputError(
                f"network.base_port: port {port} of {face.address} {reason}; write another base_port, or 0"
            )
    try:
        ports = [tuple(free_ports(face.address, wanted[0], claims))]
    except OSError as error:
        raise InputError(f"cluster.interface: no free port on {face.address} ({error.strerror})") from None
    for node, count, numbers in zip(nodes, wanted[1:], fixed[1:], strict=True):
        answer = await _asked(agents, node, partial(m.FindPorts, count=count, ports=numbers))
        ports.append(tuple(answer.numbers))
    return Site(
        names=("", *(node.name for node in nodes)),
        addresses=(face.address, *(node.address for node in nodes)),
        ports=tuple(ports),
    )


async def _asked(
    agents: Agents, node: Node, request: Callable[[int], m.Message], deadline_s: float = ASK_S
) -> m.Answer:
    """The answer of a host before anything has started: what is wrong with it is wrong with the input."""
    try:
        return await agents.ask(node, request, deadline_s)
    except RoleError as error:
        raise InputError(str(error)) from None


async def share_files(topology: Topology, agents: Agents, nodes: list[Node], say: Callable[[str], None]) -> None:
    """See that every host has the launcher's folder, shares `run_dir`, and finds the models; `InputError` if not.

    Models of the hub are fetched by each host that lacks them. On cancel: nothing of it stays in `run_dir`.
    """
    nonce, run_dir = secrets.token_hex(16), topology.run_dir
    mark = run_dir / f".shared-{nonce}"
    models = [model.path for _, model, section in topology.engine_sides if section.started]
    models.append(topology.models.student.path)
    if topology.learner.load is not None:
        models.append(topology.learner.load)
    deadline_s = ASK_S
    if any(map(is_cached_model, models)):
        deadline_s = FETCH_S
        say("models of the hub are looked for on every host, and fetched where its cache has them not")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(mark, nonce)
    except OSError as error:
        raise InputError(f"run_dir: {run_dir.absolute()} cannot be written here ({error.strerror})") from None
    try:
        async with asyncio.TaskGroup() as group:
            for node in nodes:
                group.create_task(_shares(agents, node, mark, nonce, models, deadline_s))
    except ExceptionGroup as several:
        causes = several.exceptions
        if not all(isinstance(cause, OpdError) for cause in causes):
            raise
        raise InputError("\n".join(dict.fromkeys(str(cause) for cause in causes))) from None
    finally:
        for path in run_dir.glob(f"{mark.name}*"):
            path.unlink(missing_ok=True)


async def _shares(agents: Agents, node: Node, mark: Path, nonce: str, models: list[Path], deadline_s: float) -> None:
    mine, incarnation = mark.with_name(f"{mark.name}.{node.name}"), node.incarnation
    paths = list(dict.fromkeys(str(path) for path in models))
    look = partial(m.LookAt, folder=str(Path.cwd()), seen=str(mark), mine=str(mine), nonce=nonce, paths=paths)
    await _asked(agents, node, lambda request: look(request=request), deadline_s)
    try:
        content = mine.read_text(encoding="utf-8")
    except OSError:
        content = ""
    if content != nonce:
        raise InputError(
            f"run_dir: what {node.name} writes into {mine.parent.absolute()} is not seen on the launcher's host; "
            "write a folder of a file system that every host has mounted"
        )
    node.shared = incarnation
