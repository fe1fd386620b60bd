"""What the student learns from: the sections `opd` and `reward` of a topology."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field

from opd_async.loss_names import TOPK_LOSSES
from opd_async.section import NonNegative, Positive, Seconds, Section


class OpdType(StrEnum):
    """Where the teacher runs."""

    SGLANG = "sglang"
    """On engines of its own, asked over SGLang's HTTP API (`engines.teacher`, of any kind)."""
    MEGATRON = "megatron"
    """In the learner, loaded from a Megatron checkpoint; no teacher engine and no teacher actor is started."""


class OpdSection(Section):
    """The distillation signal, and where the teacher runs. A topology that says nothing of it distils from a teacher
    on engines; one that writes `use_opd: true` must write `type` too (`opd_async.teacher_checks`)."""

    use_opd: bool = True
    """False: no teacher at all; the student learns from the reward alone."""
    type: OpdType = OpdType.SGLANG
    teacher_load: Path | None = None
    """`megatron`: the teacher's checkpoint: a run's folder, a step of it, or what `learner.convert` wrote."""
    teacher_ckpt_step: NonNegative | None = None
    """Which step's checkpoint in `teacher_load`; null takes the newest."""
    teacher_offload: bool = False
    """`megatron`: keep the teacher's weights in host memory while it is not computing."""
    loss: str = Field(default="reverse_kl", examples=["reverse_kl", "forward_kl_topk"])
    """One of `opd_async.loss_names.LOSSES`."""
    topk: Positive = 64
    """How many of the teacher's most likely tokens the losses on its top-k use; no others ask for them."""
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture of `jsd_topk` and `jsd_full`."""
    kl_coef: float = Field(default=1.0, ge=0)
    signal_clamp: float | None = Field(default=None, gt=0)
    """|log q - log p| is clamped to this; null switches the clamp off."""
    clip_ratio: float | None = Field(default=0.2, gt=0, lt=1)
    """PPO-style clip of the importance ratio; null switches it off."""
    mismatch: Literal["none", "tis", "icepop"] = "none"

    @property
    def on_engines(self) -> bool:
        """True if engines of the teacher score the student's tokens."""
        return self.use_opd and self.type is OpdType.SGLANG

    @property
    def in_learner(self) -> bool:
        """True if the learner holds the teacher."""
        return self.use_opd and self.type is OpdType.MEGATRON

    @property
    def wire_topk(self) -> int:
        """How many of the teacher's most likely tokens travel with each scored token."""
        return self.topk if self.on_engines and self.loss in TOPK_LOSSES else 0


class RewardKind(StrEnum):
    """How a response is judged."""

    NONE = "none"
    MATH = "math"
    """1 where math-verify finds the label's value in the response, else 0."""
    EXACT_MATCH = "exact_match"
    """1 where the response ended and `evaluation.answer_pattern` finds the label, else 0."""
    PYTHON = "python"
    """A number that the user's own async function returns."""


class RewardSection(Section):
    """What a response earns once it has ended, judged in processes beside each rollout actor."""

    kind: RewardKind = RewardKind.NONE
    function: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$", examples=["my_rewards:judge"])
    """`python`: awaited with prompt, response, label and metadata by name."""
    workers: Positive = 1
    """Processes per rollout actor."""
    concurrency: Positive = 16
    """`python`: calls at once in one process; the other kinds judge one response at a time."""
    timeout_s: Seconds = 10.0
    """A judgement that takes longer is given up: the response has no reward, and that is counted."""
