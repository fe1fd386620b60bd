"""The schedules that are compared, each as its project's own code does it, driven by this project's state machines.

Generation of a schedule with a `barrier` goes batch by batch: the next one begins when the last response of this one
has ended, and weights change only in between. Without, responses begin as slots become free and weights change while
they run; all schedules keep the keys and values of running responses then, the cheapest for everyone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from opd_async.config.topology import TrainOn
from opd_async.scheduling.admission import Admission, DeadlineAdmission, FilledAdmission, SampleAdmission
from opd_async.scheduling.assembly import Assembler, Sample
from opd_async.scheduling.filled_steps import FilledSteps
from opd_async.scheduling.step_policy import DeadlineCuts, StepPolicy, WholeSamples, WholeSteps


class Scoring(StrEnum):
    """What reaches the teacher."""

    WHOLE = "whole"
    """Responses that have ended."""
    STREAMED = "streamed"
    """Chunks of responses that are being generated."""


class FirstEnded(WholeSteps):
    """The first responses that have ended and are scored, whatever their order of beginning."""

    def __init__(self, samples_per_step: int) -> None:
        self.samples_per_step = samples_per_step

    def _ended(self, assembler: Assembler) -> list[Sample]:
        return [sample for sample in assembler.samples.values() if sample.finish is not None]

    def ready_tokens(self, assembler: Assembler, version: int) -> int:
        """Tokens of ended responses."""
        return sum(sample.untrained_tokens for sample in self._ended(assembler))

    def choose(self, assembler: Assembler, version: int) -> list[Sample]:
        """The `samples_per_step` that began first among those that have ended, if there are as many."""
        ended = self._ended(assembler)
        if len(ended) < self.samples_per_step:
            return []
        return sorted(ended, key=lambda sample: sample.sample_id)[: self.samples_per_step]


MakePolicy = Callable[[int, int, int | None], StepPolicy]
"""(samples per step, tokens per step, staleness) -> policy."""
MakeAdmission = Callable[[int, int, int | None], Admission]
"""The same -> rule of admission."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A schedule: what a step is made of, how far generation may run ahead, and whether it stops between batches."""

    name: str
    train_on: TrainOn
    staleness: int | None
    """Steps by which leases run ahead; with `train_on: tokens` the bound on every token's age, None for no bound."""
    policy: MakePolicy
    admission: MakeAdmission
    barrier: bool = False
    lag: int = 0
    """Behind a barrier: batches that must have been generated since before a batch is trained."""
    drops_after: int | None = None
    """At each update, responses that would be trained at a larger age than this are thrown away; None: none is."""
    stops_when_full: bool = False
    """Generation stands still from the end of as many responses as the next step has until the next update."""


def _ahead(steps: float | None = None) -> MakeAdmission:
    """Responses begin at most `steps` (None: as many as `staleness`) batches before their own."""
    return lambda samples, tokens, s: SampleAdmission(samples, (s or 0) if steps is None else steps)


def _in_order(samples: int, tokens: int, staleness: int | None) -> StepPolicy:
    return WholeSamples(samples)


def _first_ended(samples: int, tokens: int, staleness: int | None) -> StepPolicy:
    return FirstEnded(samples)


def sync() -> Rule:
    """Generate, score, train, update, one after the other.

    slime `train.py`: `generate` of a batch is awaited, then `async_train`, then `update_weights`.
    """
    return Rule(name="sync", train_on=TrainOn.SAMPLES, staleness=0, policy=_in_order, admission=_ahead(), barrier=True)


def one_step_off() -> Rule:
    """The next batch is generated while this one is trained; both end before weights change.

    slime `train_async.py` with `--update-weights-interval 1`; verl's `experimental/one_step_off_policy/ray_trainer.py`
    (`fit`), where the next batch begins after `sync_rollout_weights`. The teacher may still be scoring the last batch
    when the next one begins, as in `one_step_off_scheduler` of verl-recipe `gkd/megatron/ray_trainer.py`; slime waits.
    """
    return Rule(
        name="one_step_off", train_on=TrainOn.SAMPLES, staleness=1, policy=_in_order, admission=_ahead(), barrier=True
    )


def two_step_off() -> Rule:
    """Three batches at once: one generated, one scored, one trained.

    verl-recipe `gkd/megatron/ray_trainer.py` (`two_step_off_scheduler`).
    """
    return Rule(
        name="two_step_off",
        train_on=TrainOn.SAMPLES,
        staleness=2,
        policy=_in_order,
        admission=_ahead(),
        barrier=True,
        lag=1,
    )


def sample_stream(ahead: float) -> Rule:
    """Fully asynchronous on ended samples: `ahead` + 1 batches between lease and training, first ended first trained.

    AReaL `areal/infra/staleness_manager.py` (`get_capacity`) and `workflow_executor.py` (`wait_results` sorts by time
    of creation); async-opd `opd/dispatcher/streaming.py` (`_max_pending`); slime `rollout/fully_async_rollout.py`
    without its pool limit. TRL `experimental/async_grpo` also drops what got older than `max_staleness`; nothing is
    dropped here, so `ahead` bounds no age: a long response is trained as old as it is.
    """
    name = "sample_stream" if ahead == int(ahead) else f"stream_{ahead:g}"
    return Rule(name=name, train_on=TrainOn.SAMPLES, staleness=int(ahead), policy=_first_ended, admission=_ahead(ahead))


def whole_samples(staleness: int) -> Rule:
    """This project's `train_on: samples`: sample streaming in the order of leases, which bounds every age."""
    return Rule(
        name="whole_samples", train_on=TrainOn.SAMPLES, staleness=staleness, policy=_in_order, admission=_ahead()
    )


def deadline_cuts(staleness: int) -> Rule:
    """This project's `train_on: tokens`."""
    return Rule(
        name="deadline_cuts",
        train_on=TrainOn.TOKENS,
        staleness=staleness,
        policy=lambda samples, tokens, s: DeadlineCuts(tokens, s or 0),
        admission=lambda samples, tokens, s: DeadlineAdmission(tokens, s or 0),
    )


def filled(staleness: int | None) -> Rule:
    """This project's filled steps. None: nothing is cut, every response is trained whole and as old as it is.

    That is the trainer of PipelineRL `finetune_loop.py` too: responses from a stream, gradients added up until
    `samples_per_step` are in, weights exchanged while responses run, ages counted and not bounded.
    """
    return Rule(
        name="filled",
        train_on=TrainOn.TOKENS,
        staleness=staleness,
        policy=lambda samples, tokens, s: FilledSteps(tokens, s),
        admission=lambda samples, tokens, s: FilledAdmission(tokens, s),
    )


def dropping(limit: int) -> Rule:
    """As PipelineRL's trainer, and what gets older than `limit` steps is thrown away, in the middle of it or ended.

    prime-rl `max_off_policy_steps` (`orchestrator/scheduler.py` cancels at each update), TRL
    `experimental/async_grpo` (`max_staleness`), miles `--max-weight-staleness`. A long response lives through more
    updates than a short one, so it is thrown away more often: what is trained is shorter than what the student writes.
    """
    return dataclasses.replace(filled(None), name=f"drop_{limit}", drops_after=limit)


def partial_rollouts() -> Rule:
    """A batch is generated while the last one is trained; the first responses to end make it, the others go on later.

    slime with `--partial-rollout` (APRIL) and verl's `experimental/fully_async_policy`: more responses run than a batch
    needs; once enough have ended, the others are stopped, kept, and continued under the next weights.
    """
    return Rule(
        name="partial",
        train_on=TrainOn.SAMPLES,
        staleness=0,
        policy=_first_ended,
        admission=_ahead(math.inf),
        stops_when_full=True,
    )
