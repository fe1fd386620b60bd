"""The schedules that are compared, each as its project's own code does it, driven by this project's state machines.

Generation of a schedule with a `barrier` goes batch by batch: the next one begins when the last response of this one
has ended, and weights change only in between. Without, responses begin as slots become free and weights change while
they run; all schedules keep the keys and values of running responses then, the cheapest for everyone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from opd_async.config.topology import ScheduleSection, TrainOn
from opd_async.scheduling.assembly import Assembler, Sample
from opd_async.scheduling.step_policy import DeadlineCuts, Planner, WholeSamples


class Scoring(StrEnum):
    """What reaches the teacher."""

    WHOLE = "whole"
    """Responses that have ended."""
    STREAMED = "streamed"
    """Chunks of responses that are being generated."""


class FirstEnded:
    """The first responses that have ended and are scored, whatever their order of beginning."""

    def __init__(self, samples_per_step: int) -> None:
        self.samples_per_step = samples_per_step

    def _ended(self, assembler: Assembler) -> list[Sample]:
        return [sample for sample in assembler.samples.values() if sample.finish is not None]

    def ready_tokens(self, assembler: Assembler, version: int) -> int:
        """Tokens of ended responses."""
        return sum(sample.untrained_tokens for sample in self._ended(assembler))

    def wants_drain(self, assembler: Assembler, version: int) -> bool:
        """Never."""
        return False

    def choose(self, assembler: Assembler, version: int) -> list[Sample]:
        """The `samples_per_step` that began first among those that have ended, if there are as many."""
        ended = self._ended(assembler)
        if len(ended) < self.samples_per_step:
            return []
        return sorted(ended, key=lambda sample: sample.sample_id)[: self.samples_per_step]


@dataclass(frozen=True, slots=True)
class Rule:
    """A schedule: what a step is made of, how far generation may run ahead, and whether it stops between batches."""

    name: str
    train_on: TrainOn
    staleness: int
    """Steps by which leases run ahead; for `deadline_cuts` also the bound on every token's age."""
    barrier: bool
    make: Callable[[int, int, int], Planner]
    """(samples per step, tokens per step, staleness) -> planner."""
    lag: int = 0
    """Behind a barrier: batches that must have been generated since before a batch is trained."""

    def section(self, samples: int, tokens: int) -> ScheduleSection:
        """The topology section that the lease book reads."""
        return ScheduleSection(
            steps=1,
            train_on=self.train_on,
            samples_per_step=samples,
            tokens_per_step=tokens,
            max_staleness=self.staleness,
        )

    def planner(self, samples: int, tokens: int) -> Planner:
        """A new planner."""
        return self.make(samples, tokens, self.staleness)


def sync() -> Rule:
    """Generate, score, train, update, one after the other.

    slime `train.py`: `generate` of a batch is awaited, then `async_train`, then `update_weights`.
    """
    return Rule("sync", TrainOn.SAMPLES, 0, True, lambda samples, tokens, s: WholeSamples(samples))


def one_step_off() -> Rule:
    """The next batch is generated while this one is trained; both end before weights change.

    slime `train_async.py` with `--update-weights-interval 1`; verl's `experimental/one_step_off_policy/ray_trainer.py`
    (`fit`), where the next batch begins after `sync_rollout_weights`. The teacher may still be scoring the last batch
    when the next one begins, as in `one_step_off_scheduler` of verl-recipe `gkd/megatron/ray_trainer.py`; slime waits.
    """
    return Rule("one_step_off", TrainOn.SAMPLES, 1, True, lambda samples, tokens, s: WholeSamples(samples))


def two_step_off() -> Rule:
    """Three batches at once: one generated, one scored, one trained.

    verl-recipe `gkd/megatron/ray_trainer.py` (`two_step_off_scheduler`).
    """
    return Rule("two_step_off", TrainOn.SAMPLES, 2, True, lambda samples, tokens, s: WholeSamples(samples), lag=1)


def sample_stream(ahead: int) -> Rule:
    """Fully asynchronous on ended samples: `ahead` + 1 batches between lease and training, first ended first trained.

    AReaL `areal/infra/staleness_manager.py` (`get_capacity`) and `workflow_executor.py` (`wait_results` sorts by time
    of creation); async-opd `opd/dispatcher/streaming.py` (`_max_pending`); slime `rollout/fully_async_rollout.py`
    without its pool limit. TRL `experimental/async_grpo` also drops what got older than `max_staleness`; nothing is
    dropped here, so `ahead` bounds no age: a long response is trained as old as it is.
    """
    return Rule("sample_stream", TrainOn.SAMPLES, ahead, False, lambda samples, tokens, s: FirstEnded(samples))


def whole_samples(staleness: int) -> Rule:
    """This project's `train_on: samples`: sample streaming in the order of leases, which bounds every age."""
    return Rule("whole_samples", TrainOn.SAMPLES, staleness, False, lambda samples, tokens, s: WholeSamples(samples))


def deadline_cuts(staleness: int) -> Rule:
    """This project's `train_on: tokens`."""
    return Rule("deadline_cuts", TrainOn.TOKENS, staleness, False, lambda samples, tokens, s: DeadlineCuts(tokens, s))
