"""The topology file: one pydantic model per section, unknown keys refused.

`Topology` describes a run completely; `opd_async.plan` turns it into processes and ports, `opd_async.checks` checks it
against files, devices and ports. Lengths are in tokens, times in seconds unless the name says otherwise.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field

from opd_async.config.learning import AdvantageSection, OpdSection, RewardSection
from opd_async.config.section import (
    Decay,
    Device,
    Devices,
    NonNegative,
    Positive,
    Seconds,
    Section,
    Share,
    TeacherName,
    Url,
)


class TrainOn(StrEnum):
    """What a step is made of."""

    TOKENS = "tokens"
    """Scored tokens, cut out of responses that are still being generated when their age demands it."""
    SAMPLES = "samples"
    """Complete responses, or whole groups."""


class EngineKind(StrEnum):
    """Which server answers the SGLang HTTP API."""

    EMBEDDED = "embedded"
    """The small server in `actors.engine`, started by the supervisor."""
    SGLANG = "sglang"
    """An SGLang server, started by the supervisor with the Python of its own environment (`python`)."""
    EXTERNAL = "external"
    """Already running; `urls` says where. The supervisor never starts or stops it."""


class PauseMode(StrEnum):
    """What happens to running requests when weights change."""

    IN_PLACE = "in_place"
    """They keep their KV cache: no cost, behaviour logprobs stay those that were sampled from."""
    RETRACT = "retract"
    """Their KV cache is computed again: exact under the new weights, at the price of a prefill."""


ONE_TEACHER = "teacher"
"""Name of the only teacher, in the simple form of a topology."""


class ModelSection(Section):
    """A Hugging Face checkpoint folder."""

    path: Path


class ModelsSection(Section):
    """The student and its teachers. They must share one vocabulary."""

    student: ModelSection
    teacher: ModelSection | None = None
    """Needed where the teacher runs on engines, unless there are several."""
    teachers: dict[TeacherName, ModelSection] = Field(default_factory=dict)
    """Several teachers by name, instead of one; `data.teacher_key` says whose a prompt is."""


class PromptsSection(Section):
    """A prompts file (JSONL or parquet) and the names of its keys."""

    path: Path
    prompt_key: str = "prompt"
    label_key: str = "label"
    metadata_key: str = "metadata"


class CompletionsSection(Section):
    """A file (JSONL or parquet) of prompts with a response each, and the names of its keys."""

    path: Path
    prompt_key: str = "prompt"
    completion_key: str = "completion"
    metadata_key: str = "metadata"


class DataSection(Section):
    """Prompts to train on, and prompts held out for evaluation."""

    train: PromptsSection
    held_out: PromptsSection | None = None
    completions: CompletionsSection | None = None
    """Responses to distil on beside the student's own; `opd.gkd_lambda` is the student's share."""
    shuffle: bool = True
    chat_template: Path | None = None
    """A Jinja file used instead of the tokenizer's own chat template."""
    teacher_key: str | None = None
    """Several teachers: the key in a prompt's metadata that names its teacher."""


class EngineSection(Section):
    """The engines of one side (student or teacher)."""

    kind: EngineKind = EngineKind.EMBEDDED
    replicas: Positive = 1
    urls: tuple[Url, ...] = ()
    """External engines: one URL per replica."""
    router: Url | None = None
    """Student side: a router in front of the engines, such as smg. Requests go through it, all else to the engines."""
    python: Path | None = None
    """SGLang: the Python of the environment that has it, such as `.venv-sglang/bin/python`."""
    args: tuple[str, ...] = ()
    """SGLang: further arguments of `sglang.launch_server`, one word each; they win over those of the run."""
    tensor_parallel: Positive = 1
    """Devices that share the weights of one replica; more than 1 needs SGLang."""
    devices: Devices = ("cpu",)
    """`tensor_parallel` for each replica, one replica after the other, or one for all: `cpu`, `cuda:0`, ..."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    context_tokens: Positive = 4096
    kv_tokens: Positive = 65536
    max_running: Positive = 256
    threads: Positive = 1
    api_key: str | None = None
    admin_api_key: str | None = None

    @property
    def started(self) -> bool:
        """True if the supervisor starts these engines."""
        return self.kind is not EngineKind.EXTERNAL


class EnginesSection(Section):
    """Engines of the student and of its teachers."""

    student: EngineSection = EngineSection()
    teacher: EngineSection = EngineSection()
    teachers: dict[TeacherName, EngineSection] = Field(default_factory=dict)
    """Those of the teachers in `models.teachers`."""


class SamplingSection(Section):
    """How the student samples. Temperatures other than 1 are refused: teacher scores are at temperature 1."""

    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = -1
    max_response_tokens: Positive = 1024
    stop_token_ids: tuple[NonNegative, ...] = ()


class RolloutSection(Section):
    """Rollout actors; replica i drives the student engines whose index is i modulo the number of actors."""

    replicas: Positive = 1
    slots: Positive = 256
    """Generations at once, over all actors."""
    group_size: Positive = 1
    chunk_tokens: Positive = 512
    """A partial sample leaves for the teacher at this many new tokens, and whenever the weights change."""
    stream_interval: Positive = 8
    """Tokens per streamed event of the engine."""
    sampling: SamplingSection = SamplingSection()
    request_retries: NonNegative = 5
    request_deadline_s: Seconds = 120.0
    """A stream that is silent for so long has failed; its response goes on with a new request."""
    resend_after_s: Seconds = 30.0
    """A chunk that the learner has not acknowledged by then is sent again."""


class TeacherSection(Section):
    """Teacher actors; replica i drives the teacher engines whose index is i modulo the number of actors. With several
    teachers each has its own."""

    replicas: Positive = 1
    batch_tokens: Positive = 4096
    """New tokens in one scoring batch."""
    max_wait_ms: float = Field(default=10.0, ge=0)
    """A batch leaves no later than this after its first chunk came."""
    max_in_flight: Positive = 2
    """Scoring batches at once against one engine."""
    request_retries: NonNegative = 5
    request_deadline_s: Seconds = 120.0
    """A batch without an answer for so long has failed; it is sent again."""
    canary_every_s: Seconds = 300.0
    """How often each engine is checked with a short text."""
    min_cached_share: Share = 0.5
    """Below this share of prefixes found in an engine's cache, chunks wait for the end of their response, or for the
    step that needs them; 0: never."""


class ScheduleSection(Section):
    """When a step is taken, and how old its tokens may be."""

    steps: Positive
    train_on: TrainOn = TrainOn.TOKENS
    tokens_per_step: Positive = 65536
    samples_per_step: Positive = 256
    max_staleness: NonNegative = 1
    pause_mode: PauseMode = PauseMode.IN_PLACE


class OptimizerSection(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=1e-6, gt=0)
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_grad: float = Field(default=1.0, gt=0)
    warmup_steps: NonNegative = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    min_lr_ratio: Share = 0.1


class LearnerSection(Section):
    """The Megatron-core learner: parallel sizes and numerics."""

    load: Path | None = None
    """A Megatron checkpoint whose weights the student begins with, instead of those in `models.student.path`."""
    devices: Devices = ("cpu",)
    """One per rank, or `cpu` for all."""
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    data_parallel: Positive = 1
    context_parallel: Positive = 1
    """Every sequence is spread over so many ranks, each with an early and a late part of it."""
    expert_parallel: Positive = 1
    """Mixtures of experts: a layer's experts are spread over so many of a pipeline stage's ranks; it adds no ranks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    micro_batch_tokens: Positive = 16384
    logprob_chunk_rows: Positive = 1024
    loss_mean: Literal["tokens", "responses"] = "tokens"
    """What the loss is a mean over: all trained tokens alike, or responses, each the mean over its own tokens."""
    recompute: bool = False
    threads: Positive = 1
    bucket_mib: Positive = 256
    weight_transport: Literal["broadcast", "tensor", "disk"] = "broadcast"
    """How student engines get their weights: `broadcast` over NCCL or gloo; `tensor`, handles to the learner's memory,
    for SGLang on the learner's own GPU; `disk`, a folder in the run's that both sides can reach."""
    optimizer: OptimizerSection = OptimizerSection()

    @property
    def ranks(self) -> int:
        """World size of the learner."""
        return self.tensor_parallel * self.context_parallel * self.pipeline_parallel * self.data_parallel

    def data_rank(self, rank: int) -> int:
        """Which share of a step a rank trains. Megatron orders ranks tensor first, then context, data and pipeline."""
        return rank // (self.tensor_parallel * self.context_parallel) % self.data_parallel


class CheckpointSection(Section):
    """Checkpoints: every so many steps and at the end."""

    every_steps: Positive = 50
    keep: Positive = 2
    export_hf: bool = True
    """Write the student in Hugging Face format at the end, as `export`."""
    export_hf_every_steps: Positive | None = None
    """Also during training, as `export/step_0000N`; the newest `keep` of them stay. None: only at the end."""


class EvaluationSection(Section):
    """pass@1 on held-out prompts: before, during and after training."""

    every_steps: Positive | None = None
    """None: only before and after."""
    prompts: Positive = 1000
    """Prompts for the evaluations before and after training."""
    during_prompts: Positive = 256
    """Prompts for the evaluations in between."""
    samples_per_prompt: Positive = 1
    """Sampled responses per prompt: their mean is avg@k. One more is greedy."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Of the sampled responses. Nothing is trained on them, so it need not be 1."""
    max_response_tokens: Positive | None = None
    """None: as in `rollout.sampling`."""
    judge: Literal["answer", "reward"] = "answer"
    """What makes a response right: the answer pattern, or a positive reward."""
    answer_pattern: str = r"(?s)^(.*)$"
    """Regular expression over the response text; its first group must equal the label."""
    teacher: bool = True
    """Evaluate the teacher too, where engines of its own score."""


class NetworkSection(Section):
    """Where roles listen. Off loopback a key is required."""

    bind: str = "127.0.0.1"
    base_port: int = Field(default=0, ge=0, le=65000)
    """First of the consecutive ports that the plan uses; 0 takes free ones."""


class SupervisorSection(Section):
    """Restarts and deadlines."""

    restarts: NonNegative = 3
    """How often one role may be restarted in a run."""
    backoff_s: Seconds = 0.5
    start_deadline_s: Seconds = 180.0
    stop_deadline_s: Seconds = 20.0
    heartbeat_deadline_s: Seconds = 60.0
    step_deadline_s: Seconds = 600.0
    """No optimizer step within this time ends the run."""


class Topology(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: NonNegative = 0
    run_dir: Path = Path("runs")
    models: ModelsSection
    data: DataSection
    schedule: ScheduleSection
    engines: EnginesSection = EnginesSection()
    rollout: RolloutSection = RolloutSection()
    teacher: TeacherSection = TeacherSection()
    learner: LearnerSection = LearnerSection()
    opd: OpdSection = OpdSection()
    reward: RewardSection = RewardSection()
    advantage: AdvantageSection = AdvantageSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    network: NetworkSection = NetworkSection()
    supervisor: SupervisorSection = SupervisorSection()
    shared_devices: tuple[Device, ...] = ()
    """Devices that several roles may use; each must then be told to leave memory to the others."""

    @property
    def folder(self) -> Path:
        """Where the run leaves its files."""
        return self.run_dir / self.name

    @property
    def teachers(self) -> dict[str, tuple[ModelSection, EngineSection]]:
        """Model and engines by name of each teacher that engines of its own score for."""
        if not self.opd.on_engines:
            return {}
        if self.models.teacher is not None:
            return {ONE_TEACHER: (self.models.teacher, self.engines.teacher)}
        own = self.engines.teachers
        return {name: (model, own.get(name, EngineSection())) for name, model in self.models.teachers.items()}

    @property
    def engine_sides(self) -> tuple[tuple[str, ModelSection, EngineSection], ...]:
        """Key in the topology, model and engines of the student and of each teacher with engines of its own."""
        prefix = "teachers." if self.models.teachers else ""
        teachers = ((f"{prefix}{name}", model, section) for name, (model, section) in self.teachers.items())
        return (("student", self.models.student, self.engines.student), *teachers)

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that leaves room for `max_response_tokens` in the student's context."""
        return self.engines.student.context_tokens - self.rollout.sampling.max_response_tokens

    @property
    def max_held_out_tokens(self) -> int:
        """The same for held-out prompts and the responses of evaluations."""
        longest = self.evaluation.max_response_tokens or self.rollout.sampling.max_response_tokens
        return self.engines.student.context_tokens - longest
