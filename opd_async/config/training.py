"""What a step is and how it is taken: the sections `schedule` and `learner` of a topology."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from opd_async.config.section import (
    Auto,
    Decay,
    Devices,
    FilePath,
    HookName,
    Mebibytes,
    OrAuto,
    Positive,
    Section,
    Share,
    Steps,
    StepsOr0,
    Tokens,
)


class TrainOn(StrEnum):
    """What a step takes: tokens, or whole responses."""

    TOKENS = "tokens"
    """Scored tokens, cut out of responses that are still being generated when their age demands it."""
    SAMPLES = "samples"
    """Complete responses, or whole groups."""


class PauseMode(StrEnum):
    """What happens to running requests when weights change."""

    IN_PLACE = "in_place"
    """They keep their KV cache: no cost, behaviour logprobs stay those that were sampled from."""
    RETRACT = "retract"
    """Their KV cache is computed again: exact under the new weights, at the price of a prefill."""


class StepRule(StrEnum):
    """When a step is made, and of what."""

    AUTO = "auto"
    """`filled` with `train_on: tokens`, `deadline` with `samples`."""
    DEADLINE = "deadline"
    """A step is planned as a whole when the update before it is done. Of tokens it has more where the learner is
    behind."""
    FILLED = "filled"
    """A step is trained in parts while it fills, and has one budget."""


class ScheduleSection(Section):
    """When a step is taken, and how old its tokens may be."""

    steps: Steps
    """Optimizer steps of the whole run. A resumed run may have more."""
    train_on: TrainOn = TrainOn.TOKENS
    """`tokens`: a step takes scored tokens, also of responses that are still being generated when their age demands it.
    `samples`: a step takes complete responses, in the order of their numbers; estimators need this."""
    rule: StepRule = StepRule.AUTO
    """`auto`: `filled` with `train_on: tokens`, `deadline` with `samples`. `deadline` plans a step as a whole once the
    weights before it are out; where the learner is behind, steps of `tokens` are twice as large. `filled` trains a step
    in parts while it fills. `tokens`: it cuts last, and steps have one budget. `samples`: a group is trained as soon as
    all its responses have ended; not with estimators that whiten over a step, but for `ppo`, whose learner trains all
    parts together, nor with `learner.loss_mean: responses`."""
    tokens_per_step: Tokens = 65536
    """`tokens`: least size of a step, its budget. With `rule: deadline` it takes up to twice as much when the learner
    is behind, and more when tokens would get too old; filled steps take more only where they have to."""
    samples_per_step: Positive = 256
    """`samples`: responses in a step, exactly. A multiple of `rollout.group_size`."""
    max_staleness: StepsOr0 | None = 1
    """Largest age of a trained token: optimizer steps between the weights that sampled it and those that train it. 0 is
    strictly on-policy, and stops generation for every step. null, with `rule: filled` and `tokens`: no bound, so that
    no response is cut and each is trained as old as it is."""
    pause_mode: PauseMode = PauseMode.IN_PLACE
    """What happens to running requests when weights change. `in_place`: they keep their key/value cache. `retract`: it
    is computed again under the new weights."""
    filter: HookName | None = None
    """`samples`: `module:name` of a function that says of each finished group whether it is trained (docs/hooks.md)."""

    @property
    def step_rule(self) -> StepRule:
        """`rule`, or what `auto` stands for."""
        if self.rule is StepRule.AUTO:
            return StepRule.FILLED if self.train_on is TrainOn.TOKENS else StepRule.DEADLINE
        return self.rule


class OptimizerSection(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=1e-6, gt=0)
    """Learning rate after the warm-up."""
    beta1: Decay = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: Decay = 0.95
    """AdamW: decay of the mean of squared gradients."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW: added to the root of the mean of squared gradients."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW: share of a weight that goes in each step, times the learning rate."""
    clip_grad: float = Field(default=1.0, gt=0)
    """Largest norm of a step's gradient, over all weights; a larger gradient is scaled down."""
    warmup_steps: StepsOr0 = 0
    """Steps in which the learning rate rises to `lr`, in equal parts."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from the end of the warm-up to the last of `schedule.steps`."""
    min_lr_ratio: Share = 0.1
    """Learning rate at the end, as a share of `lr`. `constant` ignores it."""


class LearnerSection(Section):
    """The Megatron-core learner: parallel sizes and numerics."""

    load: FilePath | None = None
    """A Megatron checkpoint whose weights the student begins with, instead of those in `models.student.path`."""
    devices: Devices = ("cpu",)
    """One device for each rank, or `cpu` for all. On several hosts `[cpu]` or `[cuda]`."""
    tensor_parallel: Positive = 1
    """Ranks over which each matrix is split, and what is between matrices over tokens."""
    pipeline_parallel: Positive = 1
    """Stages to which the layers are dealt."""
    data_parallel: Positive = 1
    """Groups of ranks to which the sequences of a step are dealt."""
    context_parallel: Positive = 1
    """Ranks over which every sequence is spread, each with an early and a late part of it."""
    expert_parallel: Positive = 1
    """Mixtures of experts: ranks of a pipeline stage over which a layer's experts are spread. It adds no ranks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the forward and backward pass."""
    micro_batch_tokens: Annotated[Tokens, OrAuto(16384)] = Auto(16384)
    """Largest size of a micro-batch, prompts and context included. A single longer sequence is one by itself."""
    logprob_chunk_rows: Positive = 1024
    """Trained tokens whose logits exist at once; less memory for less, at little cost in speed."""
    loss_mean: Literal["tokens", "responses"] = "tokens"
    """What the loss is a mean over: all trained tokens alike, or responses, each the mean over its own tokens."""
    recompute: bool | Literal["selective"] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more work.
    `selective`: only what norms and gates give, 30 % less memory for hardly any work: no product or attention twice."""
    kernels: Literal["auto", "torch", "te", "liger"] = "auto"
    """Whose kernels compute on CUDA; the learner's log names them. `auto`: torch's, and FlashAttention 3 where it is
    installed on a Hopper GPU. `torch`: torch's alone. `te`: attention by Transformer Engine. `liger`: norms and gates
    by Liger, else as `auto`. On the CPU torch computes everything."""
    threads: Positive = 1
    """Threads of one rank on a CPU."""
    bucket_mib: Annotated[Mebibytes, OrAuto(256)] = Auto(256)
    """Size of the buckets in which weights are sent to the engines."""
    weight_transport: Literal["broadcast", "tensor", "disk"] = "broadcast"
    """How student engines get their weights: `broadcast` over NCCL or gloo; `tensor`, handles to the learner's memory,
    for SGLang on the learner's own GPU; `disk`, a folder in the run's that both sides can reach."""
    optimizer: OptimizerSection = OptimizerSection()
    """AdamW and its learning-rate schedule."""

    @property
    def ranks(self) -> int:
        """World size of the learner."""
        return self.tensor_parallel * self.context_parallel * self.pipeline_parallel * self.data_parallel

    def data_rank(self, rank: int) -> int:
        """Which share of a step a rank trains. Megatron orders ranks tensor first, then context, data and pipeline."""
        return rank // (self.tensor_parallel * self.context_parallel) % self.data_parallel
