"""Turn a topology into the plan of its processes: who runs where, on which ports, with which command.

    topology + model folders -> placement (several hosts) -> ports -> roles and endpoints -> Plan

`make_plan` starts nothing and writes nothing; `describe_plan` is what `--dry-run` prints.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from opd_async.config.topology import EngineKind, EngineSection, ModelSection, Topology
from opd_async.data.model_folder import read_model
from opd_async.data.vocabulary import read_tables
from opd_async.engines.command import engine_command, engine_environment
from opd_async.errors import InputError
from opd_async.plan.free_ports import free_ports
from opd_async.plan.placement import CPU, CUDA, Spot, place
from opd_async.plan.plan import Plan, RoleKind, RolePlan, counters_file, role_name
from opd_async.plan.seats import reserved, seat

LAUNCHER = "launcher"
PLAN_FILE = "plan.json"
KEYS_FOLDER = "keys"
"""Below the run's folder, while the run lasts: the keys of engines that take them from a file only."""
LAST_PORT = 65535
_SECRETS = ("--api-key", "--admin-api-key")
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
"""Environment of a learner's only rank: what the launcher's own environment says of ranks is about others."""

PortKey = tuple[str, str]
"""Role name and purpose."""
_PURPOSES = {
    RoleKind.TEACHER_ENGINE: ("http", "metrics"),
    RoleKind.STUDENT_ENGINE: ("http", "metrics"),
    RoleKind.INTAKE: ("scored", "batches", "metrics"),
    RoleKind.TEACHER: ("chunks", "metrics"),
    RoleKind.ROLLOUT: ("metrics",),
    RoleKind.LEARNER: ("master", "weights", "metrics"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The hosts of a run in the order of the placement, the launcher's first."""

    names: tuple[str, ...]
    """Empty for the launcher's host."""
    addresses: tuple[str, ...]
    ports: tuple[tuple[int, ...], ...]
    """Free ports of each host, as many as `ports_wanted` says."""


def make_plan(topology: Topology, claims: ExitStack | None = None, site: Site | None = None) -> Plan:
    """Resolve every process, port and endpoint of a valid topology (see `opd_async.checks.validation`).

    `site` has the hosts where there are several. On one host, with `network.base_port` 0, the ports are free at this
    moment and claimed until `claims` is closed, else they are consecutive from it in the order of `port_keys`. Raises
    `InputError` if the student's `config.json` cannot be read or no port is free.
    """
    student, tables = read_model(topology.models.student.path), read_tables(topology)
    ports = _assign_ports(topology, claims) if site is None else _ports_of(topology, site)
    where = _whereabouts(topology)
    site = site or Site(names=("",), addresses=(topology.network.bind,), ports=())
    roles = tuple(_role(topology, kind, index, ports, where, site) for kind, index in where)

    def endpoints(kind: RoleKind, purpose: str, scheme: str) -> tuple[str, ...]:
        return tuple(f"{scheme}://{role.host}:{role.ports[purpose]}" for role in roles if role.kind is kind)

    def engines(section: EngineSection, kind: RoleKind, teacher: str = "") -> tuple[str, ...]:
        external = tuple(url.rstrip("/") for url in section.urls)
        started = (role for role in roles if role.kind is kind and role.teacher == teacher)
        own = tuple(f"http://{role.host}:{role.ports['http']}" for role in started)
        return external if section.kind is EngineKind.EXTERNAL else own

    students = engines(topology.engines.student, RoleKind.STUDENT_ENGINE)
    return Plan(
        topology=topology,
        run_folder=topology.folder,
        control=f"tcp://{site.addresses[0]}:{ports[LAUNCHER, 'control']}",
        launcher_metrics_port=ports[LAUNCHER, "metrics"],
        launcher_host=site.addresses[0],
        scored=endpoints(RoleKind.INTAKE, "scored", "tcp"),
        batches=endpoints(RoleKind.INTAKE, "batches", "tcp"),
        chunks=endpoints(RoleKind.TEACHER, "chunks", "tcp"),
        student_engines=students,
        teacher_urls={
            name: students if topology.opd.on_student_engines else engines(side.engines, RoleKind.TEACHER_ENGINE, name)
            for name, side in topology.teachers.items()
        },
        vocab_size=tables.shared,
        student_rows=tables.student,
        teacher_rows=tables.teachers,
        stop_token_ids=tuple(sorted({*student.eos_token_ids, *topology.rollout.sampling.stop_token_ids})),
        roles=roles,
        reserved=reserved(topology),
    )


def port_keys(topology: Topology) -> list[PortKey]:
    """Every port that the run binds, in the order in which `network.base_port` counts them."""
    keys = [(LAUNCHER, "control"), (LAUNCHER, "metrics")]
    for kind, index in _whereabouts(topology):
        keys += [(role_name(kind, index), purpose) for purpose in _PURPOSES[kind]]
    return keys


def ports_wanted(topology: Topology) -> list[int]:
    """How many ports each host has to find; none with `network.base_port`, which counts them for all."""
    wanted = [0] * topology.cluster.nodes
    if topology.network.base_port == 0:
        wanted[0] = 2
        for (kind, _), spot in _whereabouts(topology).items():
            wanted[spot.host] += len(_PURPOSES[kind])
    return wanted


def ports_by_host(topology: Topology) -> list[list[int]]:
    """The ports of each host that `network.base_port` asks for; none where it is 0."""
    found: list[list[int]] = [[] for _ in range(topology.cluster.nodes)]
    if base := topology.network.base_port:
        found[0] += [base, base + 1]
        hosts = [spot.host for (kind, _), spot in _whereabouts(topology).items() for _ in _PURPOSES[kind]]
        for port, host in enumerate(hosts, base + 2):
            found[host].append(port)
    return found


def _ports_of(topology: Topology, site: Site) -> dict[PortKey, int]:
    """A port of its own host for every purpose of every process."""
    if base := topology.network.base_port:
        return {key: base + offset for offset, key in enumerate(port_keys(topology))}
    free = [iter(ports) for ports in site.ports]
    ports = {(LAUNCHER, "control"): next(free[0]), (LAUNCHER, "metrics"): next(free[0])}
    for (kind, index), spot in _whereabouts(topology).items():
        ports |= {(role_name(kind, index), purpose): next(free[spot.host]) for purpose in _PURPOSES[kind]}
    return ports


def _whereabouts(topology: Topology) -> dict[tuple[RoleKind, int], Spot]:
    """The host and the devices of every process, in start order."""
    if not topology.on_one_host:
        spots = place(topology).spots
        return {(kind, index): spot for kind in RoleKind for index, spot in enumerate(spots[kind])}
    counts = {
        RoleKind.TEACHER_ENGINE: len(_teachers_of(topology, RoleKind.TEACHER_ENGINE)),
        RoleKind.STUDENT_ENGINE: _started(topology.engines.student),
        RoleKind.INTAKE: topology.intake.replicas,
        RoleKind.TEACHER: len(_teachers_of(topology, RoleKind.TEACHER)),
        RoleKind.ROLLOUT: topology.rollout.replicas,
        RoleKind.LEARNER: 1,
    }
    each = [(kind, index) for kind in RoleKind for index in range(counts[kind])]
    return {(kind, index): Spot(0, _own_devices(topology, kind, index)) for kind, index in each}


def _own_devices(topology: Topology, kind: RoleKind, index: int) -> tuple[str, ...]:
    """The devices that the topology itself gives a process."""
    if kind is RoleKind.LEARNER:
        return rank_devices(topology)
    if kind not in (RoleKind.TEACHER_ENGINE, RoleKind.STUDENT_ENGINE):
        return (CPU,)
    _, section, replica = _engine(topology, kind, index)
    return replica_devices(section)[replica]


def _teachers_of(topology: Topology, kind: RoleKind) -> list[str]:
    """The teacher of each teacher engine that the run starts, or of each teacher actor, by index."""
    counts = dict.fromkeys(topology.teachers, topology.teacher.replicas)
    if kind is RoleKind.TEACHER_ENGINE:
        own = {} if topology.opd.on_student_engines else topology.teachers
        counts = {name: _started(side.engines) for name, side in own.items()}
    return [name for name, count in counts.items() for _ in range(count)]


def _started(section: EngineSection) -> int:
    return section.replicas if section.started else 0


def _assign_ports(topology: Topology, claims: ExitStack | None) -> dict[PortKey, int]:
    keys = port_keys(topology)
    base = topology.network.base_port
    if base:
        return {key: base + offset for offset, key in enumerate(keys)}
    try:
        return dict(zip(keys, free_ports(topology.network.bind, len(keys), claims), strict=True))
    except OSError as error:
        raise InputError(f"network.bind: no free port on {topology.network.bind} ({error.strerror})") from None


def _role(
    topology: Topology,
    kind: RoleKind,
    index: int,
    ports: dict[PortKey, int],
    where: dict[tuple[RoleKind, int], Spot],
    site: Site,
) -> RolePlan:
    own = {purpose: ports[role_name(kind, index), purpose] for purpose in _PURPOSES[kind]}
    plan_file = str(topology.folder / PLAN_FILE)
    spot = where[kind, index]
    host, devices = site.addresses[spot.host], spot.devices
    env: dict[str, str] = {}
    teacher = _teachers_of(topology, kind)[index] if kind in (RoleKind.TEACHER_ENGINE, RoleKind.TEACHER) else ""
    match kind:
        case RoleKind.TEACHER_ENGINE | RoleKind.STUDENT_ENGINE:
            model, section, _ = _engine(topology, kind, index)
            env = engine_environment(section, devices, own["metrics"])
            if section.kind is EngineKind.SGLANG:
                own["metrics"] = own["http"]  # SGLang serves them beside its API
            seed = topology.seed + index
            name = role_name(kind, index)
            keys_file, counters = topology.folder / KEYS_FOLDER / f"{name}.yaml", counters_file(topology.folder, name)
            command = engine_command(section, model.path, devices, host, own, seed, keys_file, counters)
        case RoleKind.LEARNER:
            # each rank takes the CUDA device of its local rank among those that it can see
            indices = [device.removeprefix("cuda:") for device in devices if device.startswith("cuda:")]
            # one hardware queue keeps communication kernels from overtaking; read when CUDA starts, so set before
            env = {"CUDA_VISIBLE_DEVICES": ",".join(indices), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
            first = site.addresses[where[kind, 0].host]
            hosts = sum(1 for other, _ in where if other is kind)
            # Ranks of one host meet on it, whatever address the other roles bind.
            master = ("127.0.0.1" if hosts == 1 else first, ports[role_name(kind, 0), "master"])
            command = _learner_command(len(devices), (hosts, index), master, plan_file)
            if hosts == len(devices) == 1:
                env |= ALONE
        case RoleKind.INTAKE:
            which = ("--index", str(index)) if index else ()
            command = (sys.executable, "-m", "opd_async.actors.intake", "--plan", plan_file, *which)
        case RoleKind.TEACHER | RoleKind.ROLLOUT:
            command = (
                sys.executable,
                "-m",
                f"opd_async.actors.{kind.value}",
                "--plan",
                plan_file,
                "--index",
                str(index),
            )
    return RolePlan(
        kind=kind,
        index=index,
        host=host,
        devices=devices,
        command=command,
        env=env,
        ports=own,
        teacher=teacher,
        node=site.names[spot.host],
    )


def ports_of_seat(topology: Topology) -> int:
    """How many ports a host that joins has to have."""
    return sum(len(_PURPOSES[kind]) for kind, _ in seat(topology, 0))


def ports_asked_of_seat(topology: Topology, number: int) -> list[int]:
    """Those that `network.base_port` gives a seat, behind the ports of the plan; none where it is 0.

    `topology` is that of the launch: with a smaller learner the plan has fewer, and theirs stay theirs.
    """
    if not topology.network.base_port:
        return []
    count = ports_of_seat(topology)
    first = topology.network.base_port + len(port_keys(topology)) + number * count
    return list(range(first, first + count))


def with_seat(plan: Plan, number: int, name: str, address: str, ports: Sequence[int]) -> Plan:
    """The plan with the processes of a seat, on the host of this name; `ports` are as many as `ports_of_seat` says."""
    where, free = seat(plan.topology, number), iter(ports)
    own = {(role_name(*key), purpose): next(free) for key in where for purpose in _PURPOSES[key[0]]}
    site = Site(names=("", name), addresses=(plan.launcher_host, address), ports=())
    roles = [_role(plan.topology, kind, index, own, where, site) for kind, index in where]
    urls = tuple(f"http://{role.host}:{role.ports['http']}" for role in roles if "http" in role.ports)
    roles = [role.model_copy(update={"drives": urls}) if role.kind is RoleKind.ROLLOUT else role for role in roles]
    return plan.model_copy(update={"roles": (*plan.roles, *roles), "student_engines": (*plan.student_engines, *urls)})


def with_learner(plan: Plan, data_parallel: int, homes: Sequence[RolePlan], spots: Sequence[Spot]) -> Plan:
    """The plan with a learner of so many data-parallel groups in the place of its own.

    `homes` are the processes of a learner that have hosts and ports; each spot is on the host of one of them.
    """
    sized = plan.topology.learner.model_copy(update={"data_parallel": data_parallel})
    topology = plan.topology.model_copy(update={"learner": sized})
    where = {(RoleKind.LEARNER, index): spot for index, spot in enumerate(spots)}
    names, addresses = tuple(home.node for home in homes), tuple(home.host for home in homes)
    site = Site(names=names, addresses=addresses, ports=())
    ports = {
        (role_name(*key), purpose): homes[spot.host].ports[purpose]
        for key, spot in where.items()
        for purpose in _PURPOSES[RoleKind.LEARNER]
    }
    learner = [_role(topology, kind, index, ports, where, site) for kind, index in where]
    first = next(number for number, role in enumerate(plan.roles) if role.kind is RoleKind.LEARNER)
    behind = [role for role in plan.roles[first:] if role.kind is not RoleKind.LEARNER]
    return plan.model_copy(update={"topology": topology, "roles": (*plan.roles[:first], *learner, *behind)})


def replica_devices(section: EngineSection) -> tuple[tuple[str, ...], ...]:
    """The devices of each replica; one device in the topology stands for all."""
    size = section.tensor_parallel
    devices = section.devices * (section.replicas * size) if len(section.devices) == 1 else section.devices
    return tuple(devices[size * i : size * (i + 1)] for i in range(section.replicas))


def rank_devices(topology: Topology) -> tuple[str, ...]:
    """The device of each learner rank; `cpu` alone, or `cuda` on several hosts, stands for all ranks."""
    learner = topology.learner
    return learner.devices * learner.ranks if learner.devices in ((CPU,), (CUDA,)) else learner.devices


def _engine(topology: Topology, kind: RoleKind, index: int) -> tuple[ModelSection, EngineSection, int]:
    """Model and section of an engine, and which of the section's replicas it is."""
    if kind is RoleKind.STUDENT_ENGINE:
        return topology.models.student, topology.engines.student, index
    names = _teachers_of(topology, kind)
    side = topology.teachers[names[index]]
    return side.model, side.engines, index - names.index(names[index])


def _learner_command(ranks: int, node: tuple[int, int], master: tuple[str, int], plan_file: str) -> tuple[str, ...]:
    """The command of one host's `ranks`; `node` is (hosts of the learner, which of them this is)."""
    rank = ("-m", "opd_async.learner.main", "--plan", plan_file)
    if node[0] == ranks == 1:  # nobody to meet and nobody to end: a torchrun would import torch before the rank does
        return (sys.executable, *rank)
    # it prints what ranks print; a folder for logs of its own would stay behind in /tmp
    launcher = (sys.executable, "-m", "opd_async.cluster.ranks", "--nnodes", str(node[0]), "--log-dir", os.devnull)
    number = ("--node-rank", str(node[1])) if node[0] > 1 else ()
    local = (*number, "--nproc-per-node", str(ranks), "--max-restarts", "0")
    meeting = ("--master-addr", master[0], "--master-port", str(master[1]))
    return (*launcher, *local, *meeting, *rank)


def describe_plan(plan: Plan) -> str:
    """The plan as an aligned table: role, host, devices, ports, command; keys are not shown."""
    host = plan.launcher_host
    control = f"control={plan.control.rsplit(':', 1)[1]} metrics={plan.launcher_metrics_port}"
    rows = [("role", "host", "devices", "ports", "command"), (LAUNCHER, host, "cpu", control, "(this process)")]
    teachers = plan.topology.teachers
    own = {} if plan.topology.opd.on_student_engines else teachers
    sides = [(f"{name}-engine", plan.teacher_urls[name], section) for name, (_, section) in own.items()]
    for side, urls, section in [*sides, ("student-engine", plan.student_engines, plan.topology.engines.student)]:
        if not section.started:
            rows += [(f"{side}-{i}", url, "-", "-", "(already running)") for i, url in enumerate(urls)]
    for role in plan.roles:
        ports = " ".join(f"{purpose}={port}" for purpose, port in role.ports.items())
        name = f"{role.name} ({role.teacher})" if len(teachers) > 1 and role.teacher else role.name
        rows.append((name, role.host, _devices(role.devices), ports, _readable(role.command)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]) for row in rows
    ]
    return "\n".join(lines)


def _devices(devices: tuple[str, ...]) -> str:
    same = len(devices) > 1 and len(set(devices)) == 1
    return f"{len(devices)} x {devices[0]}" if same else ",".join(devices)


def _readable(command: tuple[str, ...]) -> str:
    shown = ["***" if previous in _SECRETS else text for previous, text in zip(("", *command), command, strict=False)]
    return shlex.join(["python", *shown[1:]])
