"""Tools between the turns of an episode: where it calls one, and for how long it is away.

    turn -> the response leaves its engine -> [after `AWAY_AFTER_S`: its slot is free] -> the tool's answer -> an engine

What a tool says has no tokens here; keys and values of what was said so far are kept. Calls of an episode depend on the
seed and its number alone: every schedule has the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from opd_async.actors.rollout.waiting import AWAY_AFTER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """Turns of `turn_tokens` tokens on average, exponentially distributed, and a call between each two of them, of
    `shortest_s` to `longest_s` seconds, log-uniformly."""

    turn_tokens: float
    shortest_s: float
    longest_s: float
    frees_slot: bool = True
    """Whether a slot is free while its response waits for a tool; else it is held, as by a request that stays open."""

    @property
    def mean_s(self) -> float:
        """Of a call."""
        return (self.longest_s - self.shortest_s) / math.log(self.longest_s / self.shortest_s)

    def of(self, seed: int, sample_id: int, length: int) -> list[Call]:
        """The calls of an episode of `length` tokens, in order."""
        draw, calls, at = np.random.default_rng((seed, sample_id)), list[Call](), 0
        while True:
            at += max(1, round(draw.exponential(self.turn_tokens)))
            seconds = math.exp(draw.uniform(math.log(self.shortest_s), math.log(self.longest_s)))
            if at >= length:
                return calls
            calls.append(Call(at, seconds))

    def away_after_s(self, call: Call) -> float | None:
        """Seconds after which the slot is free; None if it is not for this call."""
        return AWAY_AFTER_S if self.frees_slot and call.seconds > AWAY_AFTER_S else None


@dataclass(frozen=True, slots=True)
class Call:
    """A tool is called at position `at`, and answers after `seconds`."""

    at: int
    seconds: float
