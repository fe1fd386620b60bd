"""The topology file: one pydantic model per section, unknown keys refused.

`Topology` describes a run completely; `opd_async.plan` turns it into processes and ports, `opd_async.checks` checks it
against files, devices and ports. Lengths are in tokens, times in seconds unless the name says otherwise. The text below
a key is its description in docs/topology.md and in editors (`opd_async.config.reference`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from opd_async.config.clustering import Backend, ClusterSection
from opd_async.config.evaluating import EvaluationSection, EvaluationSet, evaluation_sets
from opd_async.config.generating import (
    EngineKind,
    EngineSection,
    EnginesSection,
    IntakeSection,
    RolloutSection,
    SamplingSection,
    TeacherSection,
)
from opd_async.config.inputs import CompletionsSection, DataSection, ModelSection, ModelsSection, PromptsSection
from opd_async.config.learning import AdvantageSection, OpdSection, RewardSection
from opd_async.config.operating import (
    CheckpointSection,
    NetworkSection,
    SupervisorSection,
    TelemetrySection,
    TrackingSection,
)
from opd_async.config.section import Device, FilePath, NonNegative, Section
from opd_async.config.training import LearnerSection, OptimizerSection, PauseMode, ScheduleSection, StepRule, TrainOn

__all__ = (
    "ONE_TEACHER",
    "AdvantageSection",
    "Backend",
    "CheckpointSection",
    "ClusterSection",
    "CompletionsSection",
    "DataSection",
    "EngineKind",
    "EngineSection",
    "EnginesSection",
    "EvaluationSection",
    "EvaluationSet",
    "IntakeSection",
    "LearnerSection",
    "ModelSection",
    "ModelsSection",
    "NetworkSection",
    "OpdSection",
    "OptimizerSection",
    "PauseMode",
    "PromptsSection",
    "RewardSection",
    "RolloutSection",
    "SamplingSection",
    "ScheduleSection",
    "StepRule",
    "SupervisorSection",
    "TeacherSection",
    "TelemetrySection",
    "Topology",
    "TrackingSection",
    "TrainOn",
)

ONE_TEACHER = "teacher"
"""Name of the only teacher, in the simple form of a topology."""


class TeacherSide(NamedTuple):
    """One teacher with engines of its own: its model, and the engines that serve it."""

    model: ModelSection
    engines: EngineSection


class Topology(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, and of its folder in `run_dir`."""
    seed: NonNegative = 0
    """Seed of the prompts' order and of the engines' sampling. Runs still differ: which tokens meet in a step depends
    on timing."""
    run_dir: FilePath = Path("runs")
    """Folder in which the runs' folders are made."""
    models: ModelsSection
    """The student and its teachers."""
    data: DataSection
    """Prompts, and responses that a data set gives."""
    schedule: ScheduleSection
    """When a step is taken, what it takes, and how old its tokens may be."""
    engines: EnginesSection = EnginesSection()
    """The inference servers of both sides."""
    rollout: RolloutSection = RolloutSection()
    """How responses are generated, and by how many actors."""
    teacher: TeacherSection = TeacherSection()
    """How chunks are scored, and by how many actors."""
    intake: IntakeSection = IntakeSection()
    """How scored chunks get to the learner, and by how many processes."""
    learner: LearnerSection = LearnerSection()
    """How the student is trained: parallel sizes, numerics, optimizer, weight updates."""
    opd: OpdSection = OpdSection()
    """The distillation signal, and where the teacher runs."""
    reward: RewardSection = RewardSection()
    """What a response earns once it has ended."""
    advantage: AdvantageSection = AdvantageSection()
    """What is learnt from rewards, beside what is learnt from the teacher."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When the run is saved, and what is exported."""
    evaluation: EvaluationSection = EvaluationSection()
    """Evaluations on held-out prompts: before, during and after training."""
    network: NetworkSection = NetworkSection()
    """Where roles listen."""
    cluster: ClusterSection = ClusterSection()
    """The hosts of the run."""
    supervisor: SupervisorSection = SupervisorSection()
    """Restarts and deadlines."""
    telemetry: TelemetrySection = TelemetrySection()
    """What the run writes down for people to read."""
    tracking: TrackingSection = TrackingSection()
    """Where figures go beside the run's own files."""
    shared_devices: tuple[Device, ...] = ()
    """Devices that several roles may use. Each must then be told to leave memory to the others."""

    def __init__(self, **sections: Any) -> None:
        """Build a topology in code: each section as a model, or as the plain data that a file would hold.

        Raises `InputError` with every problem, in the words that a file would get.
        """
        from opd_async.config.topology_file import build  # it knows this class

        build(self, sections)

    # as pydantic marks its own: data that it validates itself, such as a file's, does not come through here
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def load(cls, path: Path | str, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Topology:
        """Read a topology file. `overrides` are values by dotted key, or `a.b=value` as on the command line.

        Relative paths in it are relative to the working directory. Raises `InputError` that lists every unknown,
        missing, repeated or wrong key with its line.
        """
        from opd_async.config.topology_file import as_overrides, load_topology

        return load_topology(Path(path), as_overrides(overrides))

    @property
    def folder(self) -> Path:
        """Where the run leaves its files."""
        return self.run_dir / self.name

    @property
    def on_one_host(self) -> bool:
        """Whether every process is a child of the launcher."""
        return self.cluster.backend is Backend.LOCAL

    @property
    def teachers(self) -> dict[str, TeacherSide]:
        """Model and engines by name of each teacher that engines score for: its own, or those of the student."""
        if not self.opd.on_engines:
            return {}
        if self.opd.of_itself:
            engines = self.engines.student if self.opd.on_student_engines else self.engines.teacher
            return {ONE_TEACHER: TeacherSide(self.models.student, engines)}
        if self.models.teacher is not None:
            return {ONE_TEACHER: TeacherSide(self.models.teacher, self.engines.teacher)}
        own = self.engines.teachers
        models = self.models.teachers
        return {name: TeacherSide(model, own.get(name, EngineSection())) for name, model in models.items()}

    @property
    def engine_sides(self) -> tuple[tuple[str, ModelSection, EngineSection], ...]:
        """Key in the topology, model and engines of the student and of each teacher with engines of its own."""
        prefix = "teachers." if self.models.teachers else ""
        sides = {} if self.opd.on_student_engines else self.teachers
        teachers = ((f"{prefix}{name}", side.model, side.engines) for name, side in sides.items())
        return (("student", self.models.student, self.engines.student), *teachers)

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room for `max_response_tokens` in the student's context."""
        return self.engines.student.context_tokens - self.rollout.sampling.max_response_tokens

    @property
    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """Every set of held-out prompts by name, with all that holds for it; empty where nothing is evaluated."""
        longest, context = self.rollout.sampling.max_response_tokens, self.engines.student.context_tokens
        return evaluation_sets(self.evaluation, self.data.held_out, longest, context)
