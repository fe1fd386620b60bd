"""What a simulated run came to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opd_async.bench.sim.open_step import OpenStep
from opd_async.forecast.workload import Workload


@dataclass(frozen=True, slots=True)
class Idle:
    """Share of the time in which a role had nothing to compute."""

    rollout: float
    teacher: float
    learner: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One schedule under one workload. Ages in steps; `max_staleness` is the setting, `age_max` what occurred.

    `bubble` is the share of all devices' time that full speed would not have needed; recompute is tokens computed for
    each token that had to be. `step_tokens` is trained tokens of a step in budgets: mean, standard deviation, largest.
    `age_budgets` is what was trained between a token's making and its training, in budgets.
    """

    schedule: str
    scoring: str
    max_staleness: int | None
    share_of_bound: float
    tokens_per_s: float
    age_mean: float
    age_p99: int
    age_max: int
    score_p50_s: float
    score_p99_s: float
    teacher_recompute: float
    learner_recompute: float
    idle: Idle
    bubble: float
    sync_blocked_s: float
    step_tokens: float
    step_tokens_sd: float
    step_tokens_max: float
    age_budgets_mean: float
    age_budgets_max: float
    lost_share: float
    """Of the tokens that were generated: thrown away for their age."""
    trained_length: float
    """Mean length of the responses that were trained to their end, relative to that of all that were begun as long
    ago: less than 1 where long ones are thrown away."""
    steps: int
    seconds: float


@dataclass(slots=True, kw_only=True)
class Marks:
    """Running totals; the difference of two of them is what happened in between."""

    now: float = 0.0
    trained: int = 0
    forwarded: int = 0
    rollout_s: float = 0.0
    teacher_s: float = 0.0
    learner_s: float = 0.0
    scored: int = 0
    computed: int = 0
    blocked_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Account:
    """Collects while the simulation runs; `begin` ends the warm-up."""

    workload: Workload
    trained: int = 0
    forwarded: int = 0
    learner_s: float = 0.0
    blocked_s: float = 0.0
    ages: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """Tokens of each step since the run began."""
    lags: Counter[int] = field(default_factory=Counter)
    """Trained tokens by how many tokens were trained since the weights that made them, up to their step."""
    counted: int = 0
    """Steps of the warm-up."""
    lost: int = 0
    """Tokens that were thrown away."""
    completed: list[int] = field(default_factory=list)
    """Lengths of the responses whose last token was trained."""
    dropped: list[int] = field(default_factory=list)
    """What the lengths of the responses that were thrown away would have been."""

    def begin(self) -> None:
        """What came before does not count in distributions."""
        self.ages.clear()
        self.latencies.clear()
        self.lags.clear()
        self.completed.clear()
        self.dropped.clear()
        self.lost = 0
        self.counted = len(self.sizes)

    def aged(self, version: int, versions: NDArray[np.int32]) -> None:
        """A step at `version` trains tokens that weights `versions` made."""
        made, counts = np.unique(versions, return_counts=True)
        for by, count in zip(made.tolist(), counts.tolist(), strict=True):
            self.ages[version - by] += count
            self.lags[sum(self.sizes[by:version])] += count

    def stepped(self, step: OpenStep) -> None:
        """A step has closed."""
        self.sizes.append(step.taken)
        self.trained += step.taken
        self.forwarded += step.forwarded
        self.learner_s += step.busy_s

    def row(self, name: tuple[str, str, int | None], first: Marks, last: Marks, steps: int) -> Row:
        """The figures between two marks."""
        work, seconds = self.workload, last.now - first.now
        rates = work.rates()
        per_s = (last.trained - first.trained) / seconds
        ages = np.array(sorted(self.ages))
        counts = np.cumsum([self.ages[age] for age in ages])
        latency = np.quantile(self.latencies or [0.0], [0.5, 0.99])
        needed = (last.trained - first.trained) * (work.mean_tokens + work.prompt_tokens) / work.mean_tokens
        gpus = work.devices
        sizes = np.array(self.sizes[self.counted :]) / work.tokens_per_step
        useful = sum(
            count * per_s / rate
            for count, rate in (
                (gpus.rollout, rates.rollout),
                (gpus.teacher, rates.teacher),
                (gpus.learner, rates.learner),
            )
        )
        schedule, scoring, max_staleness = name
        return Row(
            schedule=schedule,
            scoring=scoring,
            max_staleness=max_staleness,
            share_of_bound=per_s / rates.bound,
            tokens_per_s=per_s,
            age_mean=sum(age * count for age, count in self.ages.items()) / counts[-1],
            age_p99=int(ages[np.searchsorted(counts, 0.99 * counts[-1])]),
            age_max=int(ages[-1]),
            score_p50_s=float(latency[0]),
            score_p99_s=float(latency[1]),
            teacher_recompute=(last.computed - first.computed) / (last.scored - first.scored),
            learner_recompute=(last.forwarded - first.forwarded) / needed,
            # a batch or step counts when it begins, so that a busy role may come to a little more than all of the time
            idle=Idle(
                max(1 - (last.rollout_s - first.rollout_s) / seconds / work.engines, 0.0),
                max(1 - (last.teacher_s - first.teacher_s) / seconds / work.teachers, 0.0),
                max(1 - (last.learner_s - first.learner_s) / seconds, 0.0),
            ),
            bubble=1 - useful / gpus.total,
            sync_blocked_s=last.blocked_s - first.blocked_s,
            step_tokens=(last.trained - first.trained) / steps / work.tokens_per_step,
            step_tokens_sd=float(sizes.std()),
            step_tokens_max=float(sizes.max()),
            age_budgets_mean=sum(lag * count for lag, count in self.lags.items()) / counts[-1] / work.tokens_per_step,
            age_budgets_max=max(self.lags) / work.tokens_per_step,
            lost_share=self.lost / (self.lost + last.trained - first.trained),
            trained_length=float(np.mean(self.completed) / np.mean(self.completed + self.dropped)),
            steps=steps,
            seconds=seconds,
        )
