"""What the student learns from: the sections `opd`, `reward` and `advantage` of a topology."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, model_validator

from opd_async.config.estimators import Estimator
from opd_async.config.losses import DEFAULT_LOSS, LOSSES, TOPK_LOSSES, Mismatch
from opd_async.config.rewards import RewardKind
from opd_async.config.section import Decay, FilePath, HookName, NonNegative, Positive, Seconds, Section, StepsOr0

SELF_CLIP = 0.05
"""`opd.divergence_clip` of `type: self`, slime's: a few tokens of style would otherwise make most of the signal."""


class OpdType(StrEnum):
    """Where the teacher runs."""

    SGLANG = "sglang"
    """On engines of its own, asked over SGLang's HTTP API (`engines.teacher`, of any kind)."""
    MEGATRON = "megatron"
    """In the learner, loaded from a Megatron checkpoint; no teacher engine and no teacher actor is started."""
    SELF = "self"
    """The student itself, shown what only a teacher sees: in the learner, or on engines of its own (`opd.self`)."""


class SelfSection(Section):
    """`opd.type: self`: which weights of the student teach, and where they are."""

    weights: Literal["frozen", "live", "ema"] = "frozen"
    """`frozen`: what the student begins with. `live`: the student of each step, without a second model. `ema`: an
    average over the steps, for the learner alone."""
    place: Literal["learner", "engines"] = "learner"
    """Where they score: in the learner's ranks, or on engines: frozen weights on `engines.teacher`, live ones on the
    student's own."""
    decay: Decay = 0.999
    """`ema`: what is left of the average at each step; the student's new weights are the rest."""


class OpdSection(Section):
    """The distillation signal, and where the teacher runs. A topology that says nothing of it distils from a teacher
    on engines; one that writes `use_opd: true` must write `type` too (`opd_async.checks.teacher`)."""

    use_opd: bool = True
    """False: no teacher at all; the student learns from the reward alone."""
    type: OpdType = OpdType.SGLANG
    """Where the teacher runs. `sglang`: on engines of its own, of any kind. `megatron`: in the learner's ranks. `self`:
    the teacher is the student itself, which reads `data.teacher_prompt`."""
    self: SelfSection = SelfSection()
    """`self`: which weights of the student teach, and where they are."""
    teacher_load: FilePath | None = None
    """`megatron`: the teacher's checkpoint: a run's folder, a step of it, or what `opd convert` wrote. `self`: one to
    take in place of what the student begins with."""
    teacher_ckpt_step: NonNegative | None = None
    """Which step's checkpoint in `teacher_load`; null takes the newest."""
    teacher_offload: bool = False
    """`megatron`, `self`: keep the teacher's weights in host memory while it is not computing."""
    loss: str = Field(default=DEFAULT_LOSS, examples=list(LOSSES)[:3])
    """Name of the loss. docs/learning.md says what each of them is, and which to use. With `type: self` and nothing
    written, `jsd_full`, or `jsd_topk` on engines."""
    function: HookName | None = None
    """A loss of your own in the place of `loss`: `module:name`, called with the rows of each micro-batch
    (docs/hooks.md). `loss` still says what the rows bring along."""
    topk: Positive = 64
    """How many of the teacher's most likely tokens the losses on its top-k use; no others ask for them."""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `jsd_topk` and `jsd_full`."""
    divergence_clip: float | None = Field(default=None, gt=0)
    """Most that a token's divergence counts, nats; null: no bound. With `type: self` and nothing written, 0.05."""
    gkd_lambda: float = Field(default=1.0, ge=0, le=1)
    """Share of the samples that the student generates; the others come from `data.completions`."""
    teacher_mix: float = Field(default=0.0, ge=0, lt=1)
    """MiniLLM's share of the teacher in the distribution that is sampled from; no engine here can do it but with 0."""
    kl_coef: float = Field(default=1.0, ge=0)
    """Weight of the distillation signal."""
    signal_clamp: float | None = Field(default=None, gt=0)
    """|log q - log p| is clamped to this; null switches the clamp off."""
    clip_ratio: float | None = Field(default=0.2, gt=0, lt=1)
    """PPO-style clip of the importance ratio; null switches it off."""
    mismatch: Mismatch = "none"
    """What to do with a token whose ratio p / mu, of learner to engine, lies outside two bounds. `tis` truncates the
    ratio to them, in place of the clip; `icepop` drops the token."""
    mismatch_low: float | None = Field(default=None, ge=0)
    """Lower bound of that ratio. Null stands for 0 with `tis` and 0.5 with `icepop`."""
    mismatch_high: float | None = Field(default=None, gt=0)
    """Upper bound of that ratio. Null stands for 2 with `tis` and 5 with `icepop`."""

    plain_kl_every: StepsOr0 = 0
    """A teacher in the learner that reads other prompts: report `learner_plain_kl`, the KL to the same teacher behind
    the student's prompts, every so many steps, for one more forward pass of it; 0: never."""

    @model_validator(mode="before")
    @classmethod
    def _usual_for_self(cls, values: Any) -> Any:
        """Slime's defaults of self-distillation, which has a loss and a clip of its own."""
        if not isinstance(values, dict) or values.get("type") != OpdType.SELF:
            return values
        own = values.get("self")
        place = own.get("place") if isinstance(own, dict) else getattr(own, "place", None)
        values = {"loss": "jsd_topk" if place == "engines" else "jsd_full"} | values
        facts = LOSSES.get(values["loss"]) if isinstance(values["loss"], str) else None
        clips = facts is not None and "divergence_clip" in facts.options
        return ({"divergence_clip": SELF_CLIP} if clips else {}) | values

    @property
    def of_itself(self) -> bool:
        """True if the student is its own teacher."""
        return self.use_opd and self.type is OpdType.SELF

    @property
    def on_engines(self) -> bool:
        """True if engines of the teacher score the student's tokens."""
        own = self.type is OpdType.SELF and self.self.place == "engines"
        return self.use_opd and (self.type is OpdType.SGLANG or own)

    @property
    def on_student_engines(self) -> bool:
        """True if the student's own engines score with the weights that they hold."""
        return self.of_itself and self.on_engines and self.self.weights == "live"

    @property
    def in_learner(self) -> bool:
        """True if the learner holds the teacher."""
        return self.use_opd and not self.on_engines

    @property
    def wire_topk(self) -> int:
        """How many of the teacher's most likely tokens travel with each scored token."""
        return self.topk if self.on_engines and self.loss in TOPK_LOSSES else 0


class RewardSection(Section):
    """What a response earns once it has ended, judged in processes beside each rollout actor."""

    kind: RewardKind = RewardKind.NONE
    """How a response is judged: not at all, by math-verify, by `evaluation.answer_pattern`, by `function`, or by the
    episode that makes it (`rollout.function`)."""
    function: HookName | None = None
    """`python`: awaited with prompt, response, label and metadata by name."""
    workers: Positive = 1
    """Processes per rollout actor."""
    concurrency: Positive = 16
    """`python`: calls at once in one process; the other kinds judge one response at a time."""
    timeout_s: Seconds = 10.0
    """A judgement that takes longer is given up: the response has no reward, and that is counted."""


class CriticSection(Section):
    """`ppo`: the model that learns what a prefix is worth, in the learner's ranks and split like the student."""

    path: FilePath | None = None
    """Hugging Face folder whose `config.json` is the critic's shape; null: the student's."""
    load: FilePath | None = None
    """A Megatron checkpoint: its critic, or, where it has none, its model with a new head. Null: the weights in `path`,
    or, without one, what the student begins with."""
    lr: float | None = Field(default=None, gt=0)
    """Null stands for `learner.optimizer.lr`; everything else is as for the student."""
    value_clip: float | None = Field(default=0.2, gt=0)
    """A value that has moved by more than this since the step began is pulled no further; null switches it off."""
    updates: Positive = 1
    """Optimizer steps of the critic per step of the run, on the same responses."""
    only_steps: StepsOr0 = 0
    """So many steps at first train the critic alone."""


class AdvantageSection(Section):
    """How rewards act on the student. The distillation signal is added to the advantages after the estimator has scaled
    them."""

    estimator: Estimator = Estimator.NONE
    """How rewards become advantages. `none`: rewards are only reported."""
    normalize_std: bool = True
    """`grpo`, `gspo`, `cispo`: divide by the standard deviation of the group's rewards."""
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """`reinforce_plus_plus`, `ppo`: discount of the reward per token before the last."""
    lam: float = Field(default=1.0, ge=0.0, le=1.0)
    """`ppo`: how far ahead rewards count for more than the critic's word, from 0 (the next token) to 1 (the end)."""
    critic: CriticSection = CriticSection()
    """`ppo`: the model that learns what a prefix is worth."""
    clip_low: float | None = Field(default=None, gt=0)
    """The ratio is clipped at 1 - clip_low; null stands for `opd.clip_ratio`, 1 or more for no lower bound."""
    clip_high: float | None = Field(default=None, gt=0)
    """... and at 1 + clip_high; null stands for the lower side's."""
    dual_clip: float | None = Field(default=None, gt=1)
    """A negative advantage counts at most this many times, however large the ratio; null switches it off."""
    reference_kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the reverse KL to a reference model, which the learner then holds; 0 switches it off."""
    reference_load: FilePath | None = None
    """The reference's Megatron checkpoint, of the student's shape; null: what the student begins with."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the student's entropy, mean over trained tokens, as a bonus."""
