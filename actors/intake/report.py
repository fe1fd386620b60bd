"""Compute the figures that the intake reports: what a step consists of, and how long scores took."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.intake.steps import Taken
from opd_async.estimators.advantages import Outcome, flat_groups
from opd_async.scheduling.segments import Segment
from opd_async.transport.kinds import Finish

RESERVOIR = 20_000


def describe_step(segments: Sequence[Segment], version: int) -> tuple[dict[str, float], NDArray[np.int64]]:
    """Statistics of one step, and int64[k]: its trained tokens by staleness.

    `forwarded_tokens` counts every token of the packed sequences; `recomputed_tokens` those of prefixes that an earlier
    step had forwarded already, prompts included. `given_tokens`, where there are any, are those that nobody sampled.
    """
    ages = [version - segment.versions for segment in segments]
    staleness = np.bincount(np.concatenate(ages)) if ages else np.zeros(1, np.int64)
    stats = {
        "tokens": float(sum(segment.tokens for segment in segments)),
        "segments": float(len(segments)),
        "completed": float(sum(segment.complete for segment in segments)),
        "cuts": float(sum(not segment.complete for segment in segments)),
        "forwarded_tokens": float(sum(len(segment.token_ids) for segment in segments)),
        "recomputed_tokens": float(sum(s.start + s.prompt_tokens for s in segments if s.start)),
    }
    if any(segment.positions is not None for segment in segments):
        stats["given_tokens"] = float(sum(segment.end - segment.start - segment.tokens for segment in segments))
    return stats, staleness.astype(np.int64)


def describe_responses(trained: Sequence[Taken]) -> dict[str, float]:
    """Describe the responses that end in a step: tokens (mean and p99), the share that the limit ended, tokens of their
    prompts (mean), and, where there are any, how many are further samples of episodes. Empty for a step in which none
    ends; empty responses count with 0 tokens."""
    ended = [one for one in trained if one.complete]
    if not ended:
        return {}
    lengths = np.array([one.end for one in ended], np.float64)
    prompts = [one.segment.prompt_tokens for one in ended if one.segment is not None]
    stats = {
        "response_tokens_mean": float(lengths.mean()),
        "response_tokens_p99": float(np.quantile(lengths, 0.99)),
        "at_limit_share": sum(one.finish == Finish.LENGTH for one in ended) / len(ended),
    }
    further = sum(one.episode is not None for one in ended)
    stats |= {"further_samples": float(further)} if further else {}
    return stats | ({"prompt_tokens_mean": float(np.mean(prompts))} if prompts else {})


def describe_distribution(segments: Sequence[Segment], *, several: bool = False) -> dict[str, float]:
    """Describe how sure student and teachers were of a step's sampled tokens, in nats per token.

    `sampled_entropy` is the mean of -log mu on tokens that weights mu sampled: an unbiased estimate of the entropy of
    mu, for nothing. With `several` teachers also, of each by name, its share of the tokens and the mean of
    log mu - log q, an estimate of KL(mu || q). Tokens that a data set gives (mu is 1) do not count.
    """
    sums: dict[str, list[float]] = {}
    entropy, tokens = 0.0, 0
    for segment in segments:
        sampled = segment.behaviour_logprobs != 0.0
        count = int(sampled.sum())
        entropy -= float(segment.behaviour_logprobs.sum(dtype=np.float64))
        tokens += count
        if several and len(segment.teacher_logprobs):
            difference = (segment.behaviour_logprobs - segment.teacher_logprobs)[sampled]
            of = sums.setdefault(segment.teacher, [0.0, 0.0])
            of[0] += float(difference.sum(dtype=np.float64))
            of[1] += count
    if not tokens:
        return {}
    stats = {"sampled_entropy": entropy / tokens}
    for name, (kl, scored) in sums.items():
        if scored:
            stats |= {f"teacher_kl.{name}": kl / scored, f"teacher_share.{name}": scored / tokens}
    return stats


def describe_rewards(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean and spread of the rewards of a step's complete responses, how many responses have none, and the share of
    groups whose rewards are all equal. An episode counts once, with its first conversation."""
    leased = [outcome for outcome in outcomes if not outcome.further]
    known = np.array([outcome.reward for outcome in leased if outcome.reward is not None], np.float64)
    stats = {"rewarded": float(len(known)), "unrewarded": float(len(leased) - len(known))}
    if len(known):
        spread = {"reward_mean": float(known.mean()), "reward_std": float(known.std())}
        stats |= spread | {"flat_groups": flat_groups(outcomes)}
    return stats


class LatencyReservoir:
    """A uniform sample of all score latencies (seconds), of bounded size, whose memory is taken at once."""

    def __init__(self) -> None:
        self._values = np.full(RESERVOIR, np.nan)
        self._seen = 0
        self._random = random.Random(0)

    def add(self, seconds: float) -> None:
        """Add the score latency (seconds) of one finished response."""
        self._seen += 1
        at = self._seen - 1 if self._seen <= RESERVOIR else self._random.randrange(self._seen)
        if at < RESERVOIR:
            self._values[at] = seconds

    def quantiles(self) -> dict[str, float]:
        """p50 and p99 in seconds; empty while nothing was counted."""
        if not self._seen:
            return {}
        p50, p99 = np.quantile(self._values[: self._seen], [0.5, 0.99])
        return {"score_latency_p50_s": float(p50), "score_latency_p99_s": float(p99)}


def describe_filtered(responses: int) -> dict[str, float]:
    """How many responses of a step `schedule.filter` kept from being trained."""
    return {"filtered": float(responses)}
