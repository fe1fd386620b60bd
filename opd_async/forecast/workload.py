"""A workload in figures: what is generated, scored and trained, on which engines, at which cost; and what binds it.

`rates` are what each stage could do alone, every token computed once: a schedule is measured against the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from opd_async.forecast.cost_model import DecodeCost, PrefillCost, TrainCost
from opd_async.forecast.lengths import Lengths, typical


@dataclass(frozen=True, slots=True)
class Rates:
    """Response tokens per second of each stage when nothing holds it up."""

    rollout: float
    teacher: float
    learner: float

    @property
    def bound(self) -> float:
        """Of the slowest stage: no schedule is faster."""
        return min(self.rollout, self.teacher, self.learner)


@dataclass(frozen=True, slots=True)
class Devices:
    """How many devices each role has: the weights of a bubble."""

    rollout: int = 1
    teacher: int = 1
    learner: int = 1

    @property
    def total(self) -> int:
        """Devices of all roles together."""
        return self.rollout + self.teacher + self.learner


def mean_context(lengths: Lengths, prompt_tokens: int) -> float:
    """Tokens of prompt and response that a slot holds on average."""
    length = typical(lengths).astype(np.float64)
    # a slot is found in a response with a probability that grows with its length
    return prompt_tokens + float((length * length).mean() / length.mean()) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes and costs of a run. Costs are those of one engine, except `train`, which is the whole learner's."""

    lengths: Lengths
    decode: DecodeCost
    prefill: PrefillCost
    """Of prompts, on a student engine; generation waits for it."""
    score: PrefillCost
    train: TrainCost
    sync_s: float
    engines: int = 1
    teachers: int = 1
    slots: int = 256
    samples_per_step: int = 256
    prompt_tokens: int = 200
    chunk_tokens: int = 512
    batch_tokens: int = 16384
    max_wait_s: float = 0.01
    cache_tokens: int = 1 << 40
    """Tokens that the prefix cache of one teacher engine holds, of each sequence that it reads."""
    reads: int = 1
    """Prompts behind which the teacher scores each response."""
    group_size: int = 1
    correlation: float = 0.0
    devices: Devices = field(default_factory=Devices)

    def rates(self, budgets: float = 1.0) -> Rates:
        """See `Rates`. Rollout has every slot taken and responses at all stages of their growth; a step of the learner
        has `budgets` * `samples_per_step` responses, over which its fixed cost is spread."""
        length = typical(self.lengths).astype(np.float64)
        mean, per_engine = float(length.mean()), self.slots / self.engines
        kv_tokens = per_engine * self.mean_context
        step_s = self.decode.seconds(1, round(per_engine), kv_tokens)
        prompt_s = self.prefill.tokens_s(0, self.prompt_tokens)
        rollout = 1 / (step_s / per_engine + prompt_s / mean) * self.engines
        whole = length + self.prompt_tokens
        scored = whole.mean() * self.score.token_s + self.score.pairs.seconds(whole).mean()
        scored = self.reads * (scored + self.score.floor_s * mean / self.batch_tokens)
        trained = whole.mean() * self.train.token_s + self.train.pairs.seconds(whole).mean() + mean * self.train.row_s
        trained += self.train.floor_s / (self.samples_per_step * budgets)
        return Rates(rollout, mean / float(scored) * self.teachers, mean / float(trained))

    @property
    def mean_context(self) -> float:
        """Tokens of prompt and response that a slot holds on average."""
        return mean_context(self.lengths, self.prompt_tokens)

    @property
    def mean_tokens(self) -> float:
        """Mean response length in tokens."""
        return float(typical(self.lengths).mean())

    @property
    def tokens_per_step(self) -> int:
        """Scored tokens of a step: as many as `samples_per_step` responses have on average."""
        return round(self.samples_per_step * self.mean_tokens)
