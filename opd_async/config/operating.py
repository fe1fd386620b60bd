"""How a run is kept, watched and stopped: the sections `checkpoint`, `network` and `supervisor`."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from opd_async.config.section import (
    FilePath,
    HookName,
    Label,
    Mebibytes,
    NonNegative,
    Positive,
    Seconds,
    Section,
    Steps,
)


class CheckpointSection(Section):
    """Checkpoints: every so many steps and at the end."""

    every_steps: Steps = 50
    """Steps between checkpoints. When the learner dies, the steps since the last one are taken again."""
    keep: Positive = 2
    """Newest checkpoints that stay; older ones are removed."""
    export_hf: bool = True
    """Write the student in Hugging Face format at the end, as `export`."""
    export_hf_every_steps: Steps | None = None
    """Also during training, as `export/step_0000N`; the newest `keep` of them stay. Null: only at the end."""
    upload: str | None = Field(default=None, pattern=r"^[A-Za-z0-9+.-]+(::.*)?://.+")
    """A folder of a store, as fsspec writes it (`s3://bucket/runs`): each checkpoint and export is copied there, below
    the run's `name`, while the run goes on. The newest `keep` checkpoints stay; exports all do. Where the run folder is
    not there, `--resume` fetches the newest checkpoint first."""
    upload_deadline_s: Seconds = 1800.0
    """How long one copy may take. The end of a run waits for the last ones."""


class Encrypt(StrEnum):
    """Which messages between processes are encrypted, and show who has sent them."""

    ALL = "all"
    """Every one."""
    CONTROL = "control"
    """All but chunks of tokens on their way to teacher actors and the intake."""


class NetworkSection(Section):
    """Where roles listen. Off loopback a key is required."""

    bind: str = "127.0.0.1"
    """Address on which everything listens: one of the loopback network, 127.0.0.0/8."""
    base_port: int = Field(default=0, ge=0, le=65000)
    """First of the consecutive ports that the plan uses; 0 takes free ones."""
    encrypt: Encrypt = Encrypt.ALL
    """`control` sends chunks of tokens as they are, which costs less: for a network that nobody else is on. Whoever
    reaches the ports of the intake and of teacher actors can then read chunks, and forge those of leases that he reads.
    Commands, leases, and what learner ranks get are behind keys all the same."""


class TrackingSection(Section):
    """Where figures go beside the run's own files."""

    function: HookName | None = None
    """`module:name` of a function that gets every row of `metrics.jsonl` and every event (docs/hooks.md)."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that get the topology, every row of `metrics.jsonl`, the samples as tables and the report, each in a
    process of its own. Their own variables (`WANDB_ENTITY`, `MLFLOW_TRACKING_URI`, ...) hold."""
    project: Label = "opd_async"
    """Project of wandb and trackio, experiment of MLflow."""
    run_name: Label | None = None
    """What the run is called there. Null: the topology's `name`."""
    group: Label | None = None
    """Group of wandb and trackio, a tag in MLflow."""
    folder: FilePath | None = None
    """Where trackers that write files put them, each into a folder of its own. Null: `tracking` in the run's folder."""
    offline: bool = False
    """Write files only, send nothing: `wandb sync` and its like send them later. TensorBoard always does."""
    python: FilePath | None = None
    """A Python that has the trackers' packages. Null: the run's own."""


class TelemetrySection(Section):
    """What the run writes down for people to read."""

    samples_per_step: int = Field(default=4, ge=0, le=64)
    """How many responses of each step, and of each evaluation, are written to `samples.jsonl` with text, logprobs and
    ages. 0 writes none."""
    samples_mib: Mebibytes = 256
    """Size at which `samples.jsonl` is thinned: the responses of every second step leave it, and from then on only half
    as many steps are recorded."""
    trace: bool = False
    """Write down what each process does when, as a timeline for ui.perfetto.dev: `trace.json.gz`, made at the end."""
    trace_mib: Mebibytes = 32
    """Size at which the trace of a process ends."""
    planned_tokens_per_s: float | None = Field(default=None, gt=0.0)
    """What the slowest stage would make of this run if it never waited, as `opd plan` says it. Rows, metrics and the
    terminal then have the share of it that each step reached."""


class SupervisorSection(Section):
    """Restarts and deadlines."""

    restarts: NonNegative = 3
    """How often one role may be restarted within `restart_window_s`. The next death ends the run."""
    restart_window_s: Seconds = 3600.0
    """The time for which `restarts` counts: a restart that is older costs nothing any more."""
    backoff_s: Seconds = 0.5
    """Pause before a restart of a role. It doubles with each other one within `restart_window_s`, up to 30 s."""
    start_deadline_s: Seconds = 180.0
    """If no role comes up for so long, the start has failed. Large models need more. On several hosts it is
    `cluster.lost_s` more, before which a host is not known to be lost."""
    stop_deadline_s: Seconds = 20.0
    """How long a role may take to stop after SIGTERM, before SIGKILL."""
    heartbeat_deadline_s: Seconds = 60.0
    """A process that gives no sign of life for so long is killed: an actor, the intake, a learner rank, an engine. That
    is handled like any other death. It is also the least time that one step of learner or engine is given."""
    slow_engine: float | None = Field(default=20.0, gt=1.0)
    """An engine that takes so many times as long as the median of its peers, for each token and for each answer, and
    more than a second for an answer, gets no work for a while. Null: engines are not compared."""
    step_deadline_s: Seconds = 600.0
    """No optimizer step, and no micro-batch of one, within this time ends the run. A learner rank that gets nothing
    done of a command for four fifths of it, or of a step for 20 times as long as the longest of its last steps took, is
    killed before."""
    evaluation_deadline_s: Seconds = 1800.0
    """An evaluation that takes longer ends the run."""
