"""Deal the processes of a run out to its hosts: pure, from the counts of a topology to a host for each.

    host 0         the launcher and the intake
    learner        ranks in order, on whole hosts from the first on; ranks that share a layer are on one host
    engines        each on one host, spread so that a lost host takes as few as possible of one kind
    actors         beside the engines that they drive

What counts as a device is a GPU where a section has `devices: [cuda]`, else one of `cluster.slots_per_node`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from opd_async.config.topology import Topology
from opd_async.errors import InputError
from opd_async.plan.plan import RoleKind

CUDA = "cuda"
CPU = "cpu"
LAUNCHER_HOST = 0
_WORDS = {CUDA: "GPUs", CPU: "CPU slots"}
_KEYS = {CUDA: "cluster.gpus_per_node", CPU: "cluster.slots_per_node"}


@dataclass(frozen=True, slots=True)
class Spot:
    """Where one process is: the host's number, and its devices there."""

    host: int
    devices: tuple[str, ...]


@dataclass(slots=True)
class Room:
    """What one host still has to give."""

    gpus: list[int]
    slots: int

    def free(self, kind: str) -> int:
        """How many devices of a kind are left."""
        return len(self.gpus) if kind == CUDA else self.slots

    def take(self, kind: str, count: int) -> tuple[str, ...]:
        """Give the first of them out."""
        if kind == CUDA:
            taken, self.gpus = self.gpus[:count], self.gpus[count:]
            return tuple(f"cuda:{index}" for index in taken)
        self.slots -= count
        return (CPU,) * count


@dataclass(slots=True)
class Placement:
    """The spot of every process, by kind, in the order of its index."""

    spots: dict[RoleKind, list[Spot]] = field(default_factory=lambda: {kind: [] for kind in RoleKind})

    def on(self, host: int) -> Iterator[tuple[RoleKind, int, Spot]]:
        """Kind, index and spot of every process of a host."""
        for kind, spots in self.spots.items():
            yield from ((kind, index, spot) for index, spot in enumerate(spots) if spot.host == host)


def place(topology: Topology) -> Placement:
    """Deal the processes of a topology out to `cluster.nodes` hosts.

    Raises `InputError` with the numbers, and what to change, where there are too few devices.
    """
    cluster = topology.cluster
    hosts = [Room(list(range(cluster.gpus_per_node)), cluster.slots_per_node) for _ in range(cluster.nodes)]
    if not cluster.launcher_takes_devices:
        hosts[LAUNCHER_HOST] = Room([], 0)
    if problem := shortage(topology):
        raise InputError(problem)
    placement = Placement()
    spots = placement.spots
    learner = spots[RoleKind.LEARNER] = learner_spots(topology, hosts)
    # where a host of the learner is lost all intakes begin anew, so that those there are no further risk
    others = [Spot(learner[i % len(learner)].host, (CPU,)) for i in range(1, topology.intake.replicas)]
    spots[RoleKind.INTAKE] = [Spot(LAUNCHER_HOST, (CPU,)), *others]
    engines = _engines(topology, hosts)
    students = engines.pop("student")
    spots[RoleKind.STUDENT_ENGINE] = students
    spots[RoleKind.TEACHER_ENGINE] = [spot for side in engines.values() for spot in side]
    spots[RoleKind.ROLLOUT] = _beside(students, topology.rollout.replicas)
    asked = [students] if topology.opd.on_student_engines else engines.values()
    spots[RoleKind.TEACHER] = [spot for side in asked for spot in _beside(side, topology.teacher.replicas)]
    return placement


def shortage(topology: Topology) -> str | None:
    """Say which devices are too few in all, by how many; None if the sums suffice."""
    cluster, wanted = topology.cluster, _wanted(topology)
    hosts = cluster.nodes - (not cluster.launcher_takes_devices)
    for kind, parts in wanted.items():
        each = cluster.gpus_per_node if kind == CUDA else cluster.slots_per_node
        needed = sum(parts.values())
        if needed > hosts * each:
            told = " and ".join(f"{count} for {who}" for who, count in parts.items())
            more = -(-needed // each) + (not cluster.launcher_takes_devices) if each else None
            remedy = f"write nodes: {more}" if more else f"write {_KEYS[kind]}"
            return (
                f"cluster.nodes: {hosts} hosts x {each} {_WORDS[kind]} are {hosts * each}, and the run needs {needed} "
                f"({told}); {remedy}, or fewer replicas and ranks"
            )
    return None


def _wanted(topology: Topology) -> dict[str, dict[str, int]]:
    """How many devices of each kind everybody asks for."""
    wanted: dict[str, dict[str, int]] = {CUDA: {}, CPU: {}}
    wanted[_kind(topology.learner.devices)]["the learner"] = topology.learner.ranks
    for side, _, section in topology.engine_sides:
        if section.started:
            wanted[_kind(section.devices)][f"the engines of {side}"] = section.replicas * section.tensor_parallel
    return {kind: parts for kind, parts in wanted.items() if parts}


def _kind(devices: Sequence[str]) -> str:
    return CPU if devices[0] == CPU else CUDA


def learner_spots(topology: Topology, hosts: Sequence[Room]) -> list[Spot]:
    """A spot for each host that the learner takes, in the order of its ranks; they have that room no more.

    Raises `InputError` where they have too little.
    """
    section = topology.learner
    kind, unit, left = _kind(section.devices), section.tensor_parallel, section.ranks
    spots = []
    for number, host in enumerate(hosts):
        count = min(left, host.free(kind) // unit * unit)
        if count:
            spots.append(Spot(number, host.take(kind, count)))
            left -= count
    if left:
        each = max((host.free(kind) + len(spot.devices) for host, spot in _pairs(hosts, spots)), default=0)
        each = each or (topology.cluster.gpus_per_node if kind == CUDA else topology.cluster.slots_per_node)
        raise InputError(
            f"learner.tensor_parallel: {unit} ranks share each layer and must be on one host; hosts of {each} "
            f"{_WORDS[kind]} take {section.ranks - left} of the {section.ranks} ranks so; write a divisor of {each}, "
            "or more cluster.nodes"
        )
    return spots


def _pairs(hosts: Sequence[Room], spots: Sequence[Spot]) -> Iterator[tuple[Room, Spot]]:
    return ((hosts[spot.host], spot) for spot in spots)


def _engines(topology: Topology, hosts: Sequence[Room]) -> dict[str, list[Spot]]:
    """The spots of each side's engines, by the side's key in the topology."""
    for choose in (_emptiest, _first_fit):
        trial = [Room(list(host.gpus), host.slots) for host in hosts]
        found = _deal(topology, trial, choose)
        if found is not None:
            return found
    sizes = Counter({side: section.tensor_parallel for side, _, section in topology.engine_sides if section.started})
    side, size = sizes.most_common(1)[0]
    free = ", ".join(str(host.free(_kind(_section(topology, side)))) for host in hosts)
    raise InputError(
        f"engines.{side}.tensor_parallel: an engine is on one host, and beside the learner and the other engines the "
        f"hosts have {free} devices left, so not every engine of {size} finds room; write more cluster.nodes, fewer "
        "replicas, or a smaller tensor_parallel"
    )


def _section(topology: Topology, side: str) -> tuple[str, ...]:
    return next(section.devices for name, _, section in topology.engine_sides if name == side)


Choose = Callable[[Sequence[Room], str, int, Counter[int]], int | None]


def _deal(topology: Topology, hosts: Sequence[Room], choose: Choose) -> dict[str, list[Spot]] | None:
    """Place every engine, the largest first; None if one finds no host."""
    sides = [(side, section) for side, _, section in topology.engine_sides]
    found: dict[str, list[Spot]] = {side: [] for side, _ in sides}
    for side, section in sorted(sides, key=lambda each: -each[1].tensor_parallel):
        alike: Counter[int] = Counter()
        for _ in range(section.replicas if section.started else 0):
            kind, size = _kind(section.devices), section.tensor_parallel
            number = choose(hosts, kind, size, alike)
            if number is None:
                return None
            alike[number] += 1
            found[side].append(Spot(number, hosts[number].take(kind, size)))
    return found


def _emptiest(hosts: Sequence[Room], kind: str, size: int, alike: Counter[int]) -> int | None:
    """The host with the fewest engines of this side; of several the one with most free devices."""
    fits = [number for number, host in enumerate(hosts) if host.free(kind) >= size]
    return min(fits, key=lambda number: (alike[number], -hosts[number].free(kind), number), default=None)


def _first_fit(hosts: Sequence[Room], kind: str, size: int, alike: Counter[int]) -> int | None:
    return next((number for number, host in enumerate(hosts) if host.free(kind) >= size), None)


def _beside(engines: Sequence[Spot], actors: int) -> list[Spot]:
    """Each actor on the host that most of its engines are on: every `actors`-th engine is its own."""
    spots = []
    for index in range(actors):
        there = Counter(spot.host for spot in engines[index::actors])
        spots.append(Spot(there.most_common(1)[0][0] if there else LAUNCHER_HOST, (CPU,)))
    return spots


def describe_hosts(topology: Topology, names: Sequence[str] = ()) -> str:
    """Make the table of hosts: what each has, and which processes are on it. `names` are those of the hosts."""
    placement, cluster = place(topology), topology.cluster
    rows: list[tuple[str, ...]] = [("host", "GPUs", "CPU slots", "processes")]
    first = 0
    for host in range(cluster.nodes):
        name = names[host] if names else f"host {host}"
        processes, used = (["launcher"] if host == LAUNCHER_HOST else []), Counter[str]()
        for kind, index, spot in placement.on(host):
            label = f"{kind.value.replace('_', '-')}-{index}"
            if kind is RoleKind.LEARNER:
                last = first + len(spot.devices) - 1
                label += f" (rank {first})" if first == last else f" (ranks {first} to {last})"
                first = last + 1
            if kind in (RoleKind.LEARNER, RoleKind.STUDENT_ENGINE, RoleKind.TEACHER_ENGINE):
                used.update(_kind((device,)) for device in spot.devices)
            processes.append(label)
        there = (cluster.gpus_per_node, cluster.slots_per_node)
        if host == LAUNCHER_HOST and not cluster.launcher_takes_devices:
            there = (0, 0)
        shares = [f"{used[kind]} of {have}" for kind, have in zip((CUDA, CPU), there, strict=True)]
        rows.append((name, *shares, ", ".join(processes) or "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )
