"""What the learner is told: model, parallel sizes, numerics, optimizer and loss. Plain values, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from opd_async.config.losses import MISMATCH_BOUNDS, Mismatch

Recompute = bool | Literal["selective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Sizes of the parallel axes; the data-parallel size is what remains of the world size."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    """Every sequence is spread over so many ranks."""
    expert: int = 1
    """The experts of a layer are spread over so many of a stage's ranks, each expert whole on one."""
    timeout_s: float = 600.0
    """No collective waits longer than this."""

    @property
    def expert_tensor(self) -> int:
        """Over how many ranks an expert's own matrices are split: where experts are spread over ranks, not at all.

        To do both, Megatron gathers tensors of different lengths, which gloo cannot.
        """
        return self.tensor if self.expert == 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW (decoupled weight decay) and its learning-rate schedule; steps are optimizer steps."""

    lr: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest global L2 norm of the gradient."""
    warmup_steps: int = 0
    total_steps: int = 1
    """The decay ends here."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    min_lr_ratio: float = 0.1
    """The decay ends at this share of `lr`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The distillation term. Formulas: `learner.losses`."""

    loss: str = "reverse_kl"
    """One of `opd_async.config.losses.LOSSES`."""
    jsd_beta: float = 0.5
    """Weight of the teacher in the mixture of `jsd_topk` and `jsd_full`."""
    kl_coef: float = 1.0
    divergence_clip: float | None = None
    """Most that a token's divergence counts, nats; None: no bound."""
    clip_ratio: float | None = 0.2
    """PPO-style clip of the importance ratio at 1 - clip_ratio and (but for `clip_high`) 1 + clip_ratio; None: none."""
    signal_clamp: float | None = None
    """|log q - log p| is clamped to this, nats; None switches the clamp off."""
    mismatch: Mismatch = "none"
    mismatch_low: float | None = None
    mismatch_high: float | None = None
    """Bounds on the ratio to the behaviour policy that `mismatch` uses; None: those of `MISMATCH_BOUNDS`."""
    given: bool = False
    """Whether some responses come from a data set: their behaviour logprobs are exactly 0."""
    ratio: Literal["token", "sequence", "truncated"] = "token"
    """The form of the ratio through which advantages act. See `learner.losses.surrogate`."""
    clip_high: float | None = None
    """The clip's upper side; None: as `clip_ratio`."""
    dual_clip: float | None = None
    """A negative advantage counts at most so many times; None: however large the ratio."""
    reference_kl_coef: float = 0.0
    """Weight of the reverse KL to the reference model."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; not for losses on the whole vocabulary."""
    function: str | None = None
    """`module:name` of a loss of the user's own, in place of `loss`. See `learner.losses.own`."""

    @property
    def mismatch_bounds(self) -> tuple[float, float]:
        """The lower and the upper bound on the ratio to the behaviour policy, where `mismatch` is not `none`."""
        low, high = MISMATCH_BOUNDS[self.mismatch]
        return (
            low if self.mismatch_low is None else self.mismatch_low,
            high if self.mismatch_high is None else self.mismatch_high,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """A teacher in the learner's own ranks. See `learner.teacher`."""

    model_path: Path
    """Hugging Face folder whose `config.json` says the teacher's shape."""
    load: Path | None
    """Megatron's files of its weights, as `checkpoints.shards` finds them; None: those in `model_path`."""
    offload: bool = False
    """Keep its weights in host memory while it is not computing."""
    weights: Literal["frozen", "live", "ema"] = "frozen"
    """`live`: the student's own, of each step: nothing is loaded. `ema`: an average of them over the steps."""
    decay: float = 0.999
    """`ema`: what is left of the average at each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticConfig:
    """The model that learns what a prefix is worth, and what is made of its values. See `learner.critic`."""

    model_path: Path
    """Hugging Face folder whose `config.json` says the critic's shape."""
    load: Path | None = None
    """Megatron's files of a critic, or of a model to make one of; None: the weights in `model_path`."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    value_clip: float | None = 0.2
    """A value that has moved further than this in a step pulls no further; None: no bound."""
    updates: int = 1
    """Optimizer steps of the critic per step of the run."""
    only_steps: int = 0
    """So many steps at first train the critic alone."""
    gamma: float = 1.0
    lam: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """Everything a learner rank needs besides its data."""

    model_path: Path
    dtype: Literal["float32", "bfloat16"] = "float32"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    logprob_chunk_rows: int = 1024
    """The LM head runs on this many rows at a time."""
    recompute: Recompute = False
    """True: compute each layer again in the backward pass instead of keeping its activations; selective: only norms and
    gates. See `learner.model.again`."""
    kernels: Literal["auto", "torch", "te", "liger"] = "auto"
    """Whose kernels compute on CUDA. See `learner.model.kernels`."""
    seed: int = 0
    vocab: int | None = None
    """Ids below it are sampled, and the student's distribution is that over them; None: all rows of its table."""
    teacher: TeacherConfig | None = None
    """None: the rows come with the teacher's log-probabilities."""
    reference: TeacherConfig | None = None
    """A frozen model towards which `loss.reference_kl_coef` pulls; None: there is none."""
    frequent_tokens: int = 0
    """How many of the most frequent tokens of a micro-batch count as style in what is reported; 0: nothing is."""
    plain_kl_every: int = 0
    """Every so many steps the teacher is forwarded behind the student's prompts too, to report the KL there."""
    contrast: bool = False
    """The teacher is forwarded behind a further prompt of each sequence too, for a loss of the user's own."""
    critic: CriticConfig | None = None
    """None: advantages come with the rows, or there are none."""
