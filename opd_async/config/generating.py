"""Who generates and who scores: the sections `engines`, `rollout` and `teacher` of a topology."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from opd_async.config.section import (
    Auto,
    Devices,
    FilePath,
    HookName,
    Mebibytes,
    Milliseconds,
    NonNegative,
    OrAuto,
    Positive,
    Seconds,
    Section,
    Share,
    TeacherName,
    Tokens,
    Url,
)


class EngineKind(StrEnum):
    """Which server answers the SGLang HTTP API."""

    EMBEDDED = "embedded"
    """The small server in `actors.engine`, started by the supervisor."""
    SGLANG = "sglang"
    """An SGLang server, started by the supervisor with the Python of its own environment (`python`)."""
    EXTERNAL = "external"
    """Already running; `urls` says where. The supervisor never starts or stops it."""


class EngineSection(Section):
    """The engines of one side (student or teacher)."""

    kind: EngineKind = EngineKind.EMBEDDED
    """`embedded`: the small server of this project. `sglang`: SGLang servers, which the run starts. `external`: SGLang
    servers that run already."""
    replicas: Positive = 1
    """Number of servers, each with all of the weights."""
    urls: tuple[Url, ...] = ()
    """`external`: one URL for each replica."""
    router: Url | None = None
    """Student side: a router in front of the engines, such as smg. Requests go through it, all else to the engines."""
    python: FilePath | None = None
    """`sglang`: the Python of the environment that has it, such as `.venv-sglang/bin/python`."""
    args: tuple[str, ...] = ()
    """`sglang`: further arguments of `sglang.launch_server`, one word each. They win over those of the run."""
    tensor_parallel: Positive = 1
    """Devices that share the weights of one replica. More than 1 needs SGLang."""
    devices: Devices = ("cpu",)
    """`tensor_parallel` devices for each replica, one replica after the other, or one device for all. On several
    hosts `[cpu]` or `[cuda]`: which ones is for the placement to say."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of weights and activations. Best the learner's: what differs is in every importance ratio."""
    context_tokens: Annotated[Tokens, OrAuto(4096)] = Auto(4096)
    """Longest prompt and response together. A prompt may have this minus `rollout.sampling.max_response_tokens`."""
    kv_tokens: Annotated[Tokens, OrAuto(65536)] = Auto(65536)
    """Size of the key/value cache of one replica, over all its requests. Give it slots times mean length or more."""
    max_running: Annotated[Positive, OrAuto(256)] = Auto(256)
    """Requests that one replica computes at once; further ones wait in it."""
    threads: Positive = 1
    """Threads of one replica on a CPU."""
    api_key: str | None = None
    """Key that requests to the engines carry; the servers that the run starts demand it."""
    admin_api_key: str | None = None
    """Key for control routes (pause, weights). Null: `api_key`."""

    @property
    def started(self) -> bool:
        """True if the supervisor starts these engines."""
        return self.kind is not EngineKind.EXTERNAL


class EnginesSection(Section):
    """Engines of the student and of its teachers."""

    student: EngineSection = EngineSection()
    """The engines that generate."""
    teacher: EngineSection = EngineSection()
    """The engines that score."""
    teachers: dict[TeacherName, EngineSection] = Field(default_factory=dict)
    """The engines of each teacher in `models.teachers`, by its name. A name left out stands for the defaults."""


class SamplingSection(Section):
    """How the student samples. Temperatures other than 1 are refused: teacher scores are at temperature 1."""

    temperature: float = Field(default=1.0, ge=0.0)
    """Must be 1: the teacher scores at temperature 1. `evaluation.temperature` may differ."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Must be 1: behaviour logprobs are those of the distribution that was sampled from, without truncation."""
    top_k: int = -1
    """Must be -1 (all tokens), for the same reason."""
    max_response_tokens: Tokens = 1024
    """Longest response. It is cut there, and counts as ended."""
    stop_token_ids: tuple[NonNegative, ...] = ()
    """Token ids that end a response, beside the model's own end token."""


class ToolsSection(Section):
    """Python functions that episodes call by `session.call` and `session.use_tools`, in processes of their own. That
    is no sandbox: a tool may do what the run may do, unless `command` starts it where it may not."""

    functions: tuple[HookName, ...] = ()
    """`module:name` of each tool. Its signature and its docstring are its schema."""
    workers: Positive = 2
    """Processes of each rollout actor, which is as many calls as it runs at once."""
    deadline_s: Seconds = 30.0
    """A call that takes longer is ended with its process, and the student is told so."""
    memory_mib: Mebibytes = 4096
    """Most address space of such a process. Beyond it allocations fail."""
    result_characters: Positive = 8192
    """Longest result. It is cut there, and says how much is missing."""
    command: tuple[str, ...] = ()
    """What starts Python for them, one word each, such as `[docker, run, -i, IMAGE, python]`. It must pass
    stdin and stdout on, and end with them. Empty: the run's own Python."""


class RolloutSection(Section):
    """Rollout actors; replica i drives the student engines whose index is i modulo the number of actors."""

    replicas: Positive = 1
    """Number of rollout actors. One drives many engines; more help when its event loop is late."""
    slots: Annotated[Positive, OrAuto(256)] = Auto(256)
    """Responses that are generated at once, over all actors. Each is an open connection: beyond the hard limit on
    open files (`ulimit -Hn`) it is refused. Conversations that episodes begin beside their first may go beyond it."""
    group_size: Positive = 1
    """Responses to each prompt. Estimators that compare responses need 2 or more."""
    chunk_tokens: Annotated[Tokens, OrAuto(512)] = Auto(512)
    """A partial response leaves for the teacher at this many new tokens, and whenever the weights change."""
    stream_interval: Annotated[Tokens, OrAuto(8)] = Auto(8)
    """Tokens in one streamed event of the engine."""
    sampling: SamplingSection = SamplingSection()
    """How the student samples."""
    request_retries: NonNegative = 5
    """How often a failed request of one response is repeated. The next failure ends the run. Lost connections, hangs
    and "busy" do not count: they are waited out for `supervisor.start_deadline_s`. A refusal (HTTP 4xx) is final
    after 3 tries."""
    request_deadline_s: Seconds = 120.0
    """A stream that is silent for so long has failed. Its response goes on with a new request."""
    resend_after_s: Seconds = 30.0
    """A chunk that the intake has not acknowledged by then is sent again."""
    function: HookName | None = None
    """An episode: `async def episode(session, row)`, which makes a response of several turns with what tools or users
    say in between. Null: a response is one turn of the student."""
    endpoint: bool = False
    """Each episode has a base URL and a key (`session.base_url`, `session.api_key`), at which an agent that speaks
    OpenAI's API finds the student. Every conversation is trained, those beside the first as samples of their own."""
    tools: ToolsSection = ToolsSection()
    """What episodes may call."""
    episode_deadline_s: Seconds = 600.0
    """An episode whose own code, tools included, takes longer in all has failed. Turns of the student do not count."""


class IntakeSection(Section):
    """The processes that put scored chunks in order and feed the learner. The first one decides what a step trains.
    Each holds a share of the samples, and packs it for a share of the data-parallel ranks."""

    replicas: Positive = 1
    """Number of intakes, a divisor of `learner.data_parallel`. One carries some million tokens per second."""


class TeacherSection(Section):
    """Teacher actors; replica i drives the teacher engines whose index is i modulo the number of actors. With several
    teachers each has its own."""

    replicas: Positive = 1
    """Number of teacher actors, for each teacher."""
    batch_tokens: Annotated[Tokens, OrAuto(4096)] = Auto(4096)
    """New tokens in one scoring batch: it leaves when so many are there."""
    max_wait_ms: Milliseconds = 10.0
    """A batch leaves no later than this after its first chunk came."""
    max_in_flight: Positive = 2
    """Scoring batches at once against one engine."""
    request_retries: NonNegative = 5
    """Half of how often a failed batch is repeated, since other engines may score it. The next failure ends the run.
    Lost connections, hangs and "busy" do not count. A refusal (HTTP 4xx) is final after 3 tries."""
    request_deadline_s: Seconds = 120.0
    """A batch without an answer for so long has failed. It is sent again."""
    canary_every_s: Seconds = 300.0
    """How often each engine is checked with a short text."""
    canary_every_tokens: Tokens = 200_000
    """Most tokens, and a batch more, that an engine may score before it is checked again. If its weights were replaced,
    so many scores are wrong at most. They are named in the report."""
    min_cached_share: Share = 0.5
    """Below this share of prefixes found in an engine's cache, chunks wait for the end of their response, or for the
    step that needs them. 0: never."""
