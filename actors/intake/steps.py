"""What becomes of the samples that a step has taken: advantages, messages to the learner's ranks, and its figures.

Taken -> give_advantages -> segments -> pack -> Train, one for each data-parallel rank
                                     -> part_started, step_started -> the dispatcher
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd_async.config.topology import LearnerSection, Topology
from opd_async.estimators.advantages import Outcome, estimate
from opd_async.scheduling import packing
from opd_async.scheduling.assembly import Assembler, Sample
from opd_async.scheduling.segments import Segment
from opd_async.telemetry.trace import TRAINED, Trace
from opd_async.transport import messages as m


class Taken(NamedTuple):
    """What a step took of one sample; `segment` is None for an empty response, `reward` where there is none."""

    sample_id: int
    end: int
    complete: bool
    segment: Segment | None
    reward: float | None
    finish: str | None = None
    """How the response ended, with `complete`."""
    prompt_id: int = -1
    given: int = 0
    """Tokens before `end` that were given and not sampled."""
    episode: int | None = None
    """Of a further sample: the leased one whose episode has begun it."""
    turns: tuple[tuple[int, float], ...] = ()
    """Of `reward`, what turns have earned: (position after the turn, how much)."""


def taken_of(assembler: Assembler, sample: Sample, end: int, *, complete: bool) -> Taken:
    """Take what is held of a sample before `end`; `complete`: that is its end."""
    return Taken(
        sample_id=sample.sample_id,
        end=end,
        complete=complete,
        segment=assembler.take_to(sample, end, complete=complete),
        reward=sample.reward,
        finish=sample.finish,
        prompt_id=sample.prompt_id,
        given=sample.given,
        episode=sample.episode,
        turns=sample.turns,
    )


def give_advantages(taken: list[Taken], topology: Topology) -> list[Outcome]:
    """Set the advantage of every token of the step; returns the complete responses that they were made of.

    Without an estimator segments stay as they are. PPO's are made by the learner: its segments get their reward.
    """
    group_size, section = topology.rollout.group_size, topology.advantage
    complete = [one for one in taken if one.complete]
    outcomes = [
        Outcome(
            (one.sample_id if one.episode is None else one.episode) // group_size,
            one.reward,
            one.segment.tokens if one.segment else 0,
            further=one.episode is not None,
        )
        for one in complete
    ]
    if section.estimator.facts.rewards:
        for one, advantages in zip(complete, estimate(outcomes, section), strict=True):
            if one.segment is not None:
                one.segment.advantages = advantages
                if section.estimator.facts.critic:
                    one.segment.rewards = _by_token(one, one.segment)
    return outcomes


def _by_token(one: Taken, segment: Segment) -> NDArray[np.float32]:
    """float32[n]: what is earned with each token of a whole response: with the last one of each turn that was told what
    it has earned, and with the last of all what is left. NaN where there is no reward."""
    if one.reward is None:
        return np.full(segment.tokens, np.nan, np.float32)
    positions = np.arange(segment.start, segment.end) if segment.positions is None else segment.positions
    rewards = np.zeros(segment.tokens)
    for end, reward in one.turns:
        rewards[max(int(np.searchsorted(positions, end)) - 1, 0)] += reward
    rewards[-1] += one.reward - sum(reward for _, reward in one.turns)
    return rewards.astype(np.float32)


def pack(
    segments: list[Segment],
    version: int,
    learner: LearnerSection,
    *,
    part: int = 0,
    last: bool = True,
    intakes: int = 1,
    whole: packing.Whole | None = None,
) -> list[m.Train]:
    """A part of the step at `version`, or all of it, as one message for each data-parallel rank; of one intake's share
    for its ranks, where there are several."""
    ranks, tokens = learner.data_parallel // intakes, learner.micro_batch_tokens
    batches = packing.pack(segments, version, ranks, tokens, part=part, last=last, whole=whole)
    return [packing.to_message(batch) for batch in batches]


def part_started(version: int, tokens: int, taken: list[Taken]) -> m.PartStarted:
    """What the dispatcher is told of a part that is not the last; the step has `tokens` with it."""
    return m.PartStarted(version=version, tokens=tokens, **_columns(taken))


def step_started(
    version: int,
    taken: list[Taken],
    waited_s: float,
    stats: dict[str, float],
    staleness_counts: NDArray[np.int64],
) -> m.StepStarted:
    """What the dispatcher is told of a step: figures for `metrics.jsonl`, int64[age + 1] counts, and the samples.

    `taken` has those of the last part; `waited_s` is for how many seconds the learner waited between parts.
    """
    return m.StepStarted(
        version=version, waited_s=waited_s, stats=stats, staleness_counts=staleness_counts, **_columns(taken)
    )


def _columns(taken: list[Taken]) -> dict[str, Any]:
    given = np.array([one.given for one in taken], np.int32)
    return {
        "taken_ids": np.array([one.sample_id for one in taken], np.int64),
        "taken_ends": np.array([one.end for one in taken], np.int32),
        "taken_complete": np.array([one.complete for one in taken], np.int32),
        "taken_given": given if given.any() else None,
    }


def trace_part(trace: Trace, step: int, part: int, taken: list[Taken]) -> None:
    """Note what a part of the step with this number trains."""
    if not trace.on:  # a word for each sample
        return
    trace.event("parts", f"step {step}, part {part}", samples=len(taken))
    for one in taken:
        how = "trained to its end" if one.complete else "cut"
        trace.event(TRAINED, f"{how}, step {step}", sample=one.sample_id, end=one.end, step=step)
