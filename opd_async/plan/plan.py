"""The resolved plan of a run: every process, its command, host, devices and ports.

The plan is saved as `plan.json` in the run's folder; every role process reads it and nothing else.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import Field

from opd_async.config.operating import Encrypt
from opd_async.config.section import Section
from opd_async.config.topology import EngineSection, Topology
from opd_async.keys import RunKeys


class RoleKind(StrEnum):
    """The kinds of process in a run, in start order."""

    TEACHER_ENGINE = "teacher_engine"
    STUDENT_ENGINE = "student_engine"
    INTAKE = "intake"
    TEACHER = "teacher"
    ROLLOUT = "rollout"
    LEARNER = "learner"


def role_name(kind: RoleKind, index: int) -> str:
    """`rollout-0`, `student-engine-1`, ...: the name in logs, metrics and messages."""
    return f"{kind.value.replace('_', '-')}-{index}"


COUNTERS_FOLDER = "counters"
"""Below the run's folder: what each process has counted, for the one that follows it."""


def counters_file(run_folder: Path, process: str) -> Path:
    """Where a process of a run keeps its counters."""
    return run_folder / COUNTERS_FOLDER / f"{process}.json"


class RolePlan(Section):
    """One process of the run. The launcher itself (supervisor and dispatcher) is not among them."""

    kind: RoleKind
    index: int
    host: str
    devices: tuple[str, ...]
    command: tuple[str, ...]
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables, beside those of the supervisor."""
    ports: dict[str, int]
    """Port by purpose: `http`, `chunks`, `scored`, `batches`, `metrics`."""
    teacher: str = ""
    """The teacher that a teacher engine or actor serves."""
    node: str = ""
    """Name of the host that it is on; empty for the launcher's."""
    drives: tuple[str, ...] = ()
    """Base URLs of the engines of a rollout actor that has joined with them; others share those of the topology."""

    @property
    def name(self) -> str:
        """See `role_name`."""
        return role_name(self.kind, self.index)


class Plan(Section):
    """Everything that a role needs to know at start."""

    topology: Topology
    run_folder: Path
    control: str
    """ZeroMQ endpoint of the dispatcher (ROUTER)."""
    launcher_metrics_port: int
    launcher_host: str = "127.0.0.1"
    """Address of the launcher's host."""
    scored: tuple[str, ...]
    """Endpoint of each intake for scored chunks (PULL); sample n goes to intake n modulo their number."""
    batches: tuple[str, ...]
    """Endpoint of each intake for learner ranks (ROUTER), and of the first one for the other intakes."""
    chunks: tuple[str, ...]
    """Endpoint of each teacher actor for chunks (PULL)."""
    student_engines: tuple[str, ...]
    """Base URL of each student engine."""
    teacher_urls: dict[str, tuple[str, ...]]
    """Base URLs of the engines of each teacher."""
    vocab_size: int
    """Ids in [0, vocab_size) have a row in the tables of student and teachers, and only these are sampled."""
    student_rows: int
    """Rows of the student's table, `vocab_size` at least."""
    teacher_rows: dict[str, int]
    """Rows of each teacher's table."""
    stop_token_ids: tuple[int, ...]
    """Ids that end a response: those of the student's generation config and of the topology."""
    roles: tuple[RolePlan, ...]
    reserved: tuple[str, ...] = ()
    """Names of the roles of hosts that may join, and of those that have (`seats.py`)."""

    @property
    def teacher_engines(self) -> tuple[str, ...]:
        """Base URL of each teacher engine, of all teachers."""
        return tuple(url for urls in self.teacher_urls.values() for url in urls)

    @property
    def device_count(self) -> int:
        """How many devices the run's processes use; the processors of a host are one."""
        return len({(role.node, device) for role in self.roles for device in role.devices})

    @property
    def engine_names(self) -> dict[str, str]:
        """What each engine is called, by its base URL: the role that it is, or its URL where the run starts none."""
        kinds = (RoleKind.STUDENT_ENGINE, RoleKind.TEACHER_ENGINE)
        started = {f"http://{role.host}:{role.ports['http']}": role.name for role in self.roles if role.kind in kinds}
        return {url: started.get(url, url) for url in (*self.student_engines, *self.teacher_engines)}

    def section(self, url: str) -> EngineSection:
        """What the topology says of the engine at `url`."""
        for name, urls in self.teacher_urls.items():
            if url in urls:
                return self.topology.teachers[name].engines
        return self.topology.engines.student

    def table_rows(self, url: str) -> int:
        """Rows of the table of the model that the engine at `url` serves."""
        for name, urls in self.teacher_urls.items():
            if url in urls:
                return self.teacher_rows[name]
        return self.student_rows

    @property
    def peers(self) -> tuple[str, ...]:
        """Everybody who may connect to a socket of the run: roles, and the ranks of the learner."""
        ranks = (f"rank-{rank}" for rank in range(self.topology.learner.ranks))
        return tuple(dict.fromkeys((*(role.name for role in self.roles), *self.reserved, *ranks)))

    @property
    def intakes(self) -> int:
        """How many intakes there are."""
        return len(self.scored)

    def intake_of_rank(self, rank: int) -> int:
        """Index of the intake that a learner rank gets its share of each step from."""
        return self.topology.learner.data_rank(rank) % self.intakes

    @property
    def actors(self) -> dict[int, str]:
        """Index and name of every rollout actor, with those of hosts that may join."""
        names = (*(role.name for role in self.of_kind(RoleKind.ROLLOUT)), *self.reserved)
        kinds = ((name.rpartition("-"), name) for name in names)
        return {int(index): name for (kind, _, index), name in kinds if kind == RoleKind.ROLLOUT.value}

    @property
    def guards_chunks(self) -> bool:
        """Whether chunks are encrypted, and come from whom they say (`network.encrypt`)."""
        return self.topology.network.encrypt is Encrypt.ALL

    def with_keys(self, keys: RunKeys) -> Plan:
        """The same plan; engines that the run starts and that the topology gives no keys have those of the run.

        A router in front of engines knows no key of the run, so there only the topology gives an `api_key`.
        """
        engines = self.topology.engines

        def keyed(section: EngineSection) -> EngineSection:
            if not section.started:
                return section
            api = section.api_key or (None if section.router else keys.api)
            return section.model_copy(update={"api_key": api, "admin_api_key": section.admin_api_key or keys.admin})

        # teachers that leave their section out have it by default, so each gets one of its own
        several = {name: engines.teachers.get(name, EngineSection()) for name in self.topology.models.teachers}
        update = {
            "student": keyed(engines.student),
            "teacher": keyed(engines.teacher),
            "teachers": {name: keyed(section) for name, section in several.items()},
        }
        topology = self.topology.model_copy(update={"engines": engines.model_copy(update=update)})
        return self.model_copy(update={"topology": topology})

    def engines_of(self, actor: RolePlan) -> tuple[str, ...]:
        """The engines that a teacher actor drives: every n-th of its teacher's, who has n actors."""
        actors = [role.index for role in self.of_kind(RoleKind.TEACHER) if role.teacher == actor.teacher]
        return self.teacher_urls[actor.teacher][actors.index(actor.index) :: len(actors)]

    @property
    def scorers(self) -> dict[str, tuple[int, ...]]:
        """The teacher actors of each teacher by their index, which is the route of chunks to them; none where no engine
        scores."""
        actors = self.of_kind(RoleKind.TEACHER) if self.topology.opd.on_engines else ()
        names = dict.fromkeys(role.teacher for role in actors)
        return {name: tuple(role.index for role in actors if role.teacher == name) for name in names}

    def students_of(self, actor: RolePlan) -> tuple[str, ...]:
        """Where a rollout actor sends its requests: every n-th student engine, of n actors, or the router to all."""
        router = self.topology.engines.student.router
        if router is not None:
            return (router.rstrip("/"),)
        joined = {url for role in self.roles for url in role.drives}
        shared = tuple(url for url in self.student_engines if url not in joined)
        return actor.drives or shared[actor.index :: self.topology.rollout.replicas]

    def driven_by(self, actor: str) -> tuple[str, ...]:
        """The engines that the rollout or teacher actor of that name sends requests to; none for other roles."""
        role = next((role for role in self.roles if role.name == actor), None)
        if role is None or role.kind not in (RoleKind.ROLLOUT, RoleKind.TEACHER):
            return ()
        return self.engines_of(role) if role.kind is RoleKind.TEACHER else self.students_of(role)

    def role(self, kind: RoleKind, index: int) -> RolePlan:
        """The role of that kind and index; `KeyError` if the plan has none."""
        for role in self.roles:
            if role.kind is kind and role.index == index:
                return role
        raise KeyError(f"no {kind.value} {index} in the plan")

    def role_of_rank(self, rank: int) -> RolePlan:
        """The role, one for each host of the learner, whose process a learner rank is; `KeyError` if there is none."""
        last = 0
        for role in self.of_kind(RoleKind.LEARNER):
            last += len(role.devices)
            if rank < last:
                return role
        raise KeyError(f"no learner rank {rank} in the plan")

    def learner_of(self, rank: int) -> str:
        """The name of that role; `learner-0` in plans that start no learner."""
        try:
            return self.role_of_rank(rank).name
        except KeyError:
            return "learner-0"

    def of_kind(self, kind: RoleKind) -> tuple[RolePlan, ...]:
        """All roles of one kind, by index."""
        return tuple(role for role in self.roles if role.kind is kind)
