"""What flows through a forecast: slots as one array, a queue at the teacher that is a number, responses that ended.

    lengths -> slots (one array) -> tokens that left -> tokens that are scored -> ended responses -> a rule of steps

No chunks and no messages: one engine stands for all, and a teacher's cache holds everything or nothing. What a step
takes of it is a matter of the rules in `deadline_flow.py` and `filled_flow.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from opd_async.forecast.lengths import LengthStream
from opd_async.forecast.workload import Workload
from opd_async.scheduling.cache_share import SENTINEL_EVERY

NEVER = 1 << 30
SENTINELS = 1 / math.log(2) / SENTINEL_EVERY
"""Tokens that sentinels compute again for each new one, where the teacher's cache does not hold."""


@dataclass(slots=True)
class Ended:
    """A response that waits to be trained: from where, how long, and the version of its oldest untrained token."""

    start: int
    end: int
    oldest: int
    scored_at: float


@dataclass(slots=True, kw_only=True)
class Flow:
    """The state between two ticks. Arrays have one element a slot; an empty slot has length 0."""

    work: Workload
    patience: int
    """Steps that tokens of a response may wait for its end, where the teacher's caches do not hold."""
    coarse: bool
    """The teacher's caches do not hold: tokens wait for the end of their response, or until they are due."""
    lengths: LengthStream
    position: NDArray[np.float64]
    length: NDArray[np.int64]
    trained: NDArray[np.float64]
    oldest: NDArray[np.int64]
    """Version of the oldest token that is not trained."""
    sent: NDArray[np.float64]
    """Tokens that have left for the teacher."""
    unsent: NDArray[np.int64]
    """Version of the oldest token that has not left."""
    sent_at: NDArray[np.float64]
    """`queued` when tokens last left: what the teacher has computed since then may have taken their place."""
    now: float = 0.0
    version: int = 0
    leased: int = 0
    ended: list[Ended] = field(default_factory=list)
    new: float = 0.0
    """Tokens that have left, each once."""
    queued: float = 0.0
    """Tokens for the teacher to compute, prefixes included."""
    scored: float = 0.0
    """Those that it has computed."""
    resume_at: float = 0.0
    step_tokens: float = 0.0
    forwarded: float = 0.0
    train_s: float = 0.0
    rollout_s: float = 0.0

    @property
    def scored_tokens(self) -> int:
        """Untrained tokens of responses that have ended and are scored."""
        return sum(one.end - one.start for one in self.ended if one.scored_at <= self.scored)

    def cut(self, which: NDArray[np.bool_] | NDArray[np.intp]) -> list[tuple[int, int]]:
        """Take all that has left of these running responses; returns (start, end) of each."""
        slots = np.nonzero(which)[0] if which.dtype == np.bool_ else which
        segments = [(int(self.trained[slot]), int(self.sent[slot])) for slot in slots]
        self.trained[slots] = self.sent[slots]
        self.oldest[slots] = self.unsent[slots]
        return segments

    def train(self, segments: list[tuple[int, int]], first: bool) -> float:
        """Account for these (start, end) as trained; returns seconds. `first`: they are the first of their step."""
        train, prompt = self.work.train, self.work.prompt_tokens
        seconds = train.floor_s * first + sum(train.segment_s(prompt + end, end - start) for start, end in segments)
        self.step_tokens += sum(end - start for start, end in segments)
        self.forwarded += sum(prompt + end for _, end in segments)
        self.train_s += seconds
        return seconds

    def update(self, at: float) -> None:
        """New weights begin to load `at` this time: what steps need soon leaves for the teacher."""
        self.version += 1
        self.resume_at = at + self.work.sync_s
        self.send(self.unsent + self.patience <= self.version)

    def send(self, which: NDArray[np.bool_]) -> None:
        """All tokens of these slots leave for the teacher."""
        new = float((self.position - self.sent)[which].sum())
        self.new += new
        self.queued += new
        if self.coarse:
            held = self.work.cache_tokens * self.work.teachers
            lost = which & (self.sent > 0) & (self.queued - self.sent_at > held)
            self.queued += SENTINELS * new + float((self.sent + self.work.prompt_tokens)[lost].sum())
        self.sent = np.where(which, self.position, self.sent)
        self.unsent = np.where(which, NEVER, self.unsent)
        self.sent_at = np.where(which, self.queued, self.sent_at)


class Steps(Protocol):
    """A rule of steps, as a flow."""

    def stands(self, flow: Flow) -> bool:
        """Whether generation stands still although no weights are loaded."""

    def admits(self, flow: Flow, generating: int, waiting: int) -> bool:
        """Whether one more response may begin beside those, and `waiting` untrained tokens of ended ones."""

    def turn(self, flow: Flow) -> None:
        """What the learner does at `flow.now`."""


def begin(work: Workload, staleness: int | None) -> Flow:
    """Empty slots at weights 0; `staleness` None: no bound."""
    slots = work.slots
    return Flow(
        work=work,
        patience=NEVER if staleness is None else max(staleness - 1, 1),
        coarse=not cache_holds(work),
        lengths=LengthStream(work.lengths, 0, work.group_size, work.correlation),
        position=np.zeros(slots),
        length=np.zeros(slots, np.int64),
        trained=np.zeros(slots),
        oldest=np.full(slots, NEVER),
        sent=np.zeros(slots),
        unsent=np.full(slots, NEVER),
        sent_at=np.zeros(slots),
    )


def cache_holds(work: Workload) -> bool:
    """Whether the teacher's caches keep every response under way until its end."""
    rates = work.rates()
    under_way = work.slots * work.mean_context
    # what has ended stays until it is the least recently used: as long as a running response goes without a chunk
    ended = rates.bound * work.chunk_tokens * work.slots / rates.rollout
    return work.cache_tokens * work.teachers >= under_way + ended


def tick(flow: Flow, steps: Steps, seconds: float, score_rate: float) -> None:
    """Let `seconds` pass."""
    flow.now += seconds
    if flow.now >= flow.resume_at and not steps.stands(flow):
        _generate(flow, steps, seconds)
    flow.scored = min(flow.queued, flow.scored + score_rate * seconds)
    steps.turn(flow)


def _generate(flow: Flow, steps: Steps, seconds: float) -> None:
    work = flow.work
    begun = _admit(flow, steps)
    running = flow.length > 0
    active = int(running.sum())
    if not active:
        return
    flow.rollout_s += seconds
    seconds = max(seconds - work.prefill.tokens_s(0, work.prompt_tokens) * begun / work.engines, 0.0)
    cached = float(flow.position[running].sum()) + active * work.prompt_tokens
    made = work.decode.steps(seconds, max(1, round(active / work.engines)), cached / work.engines)
    gained = np.minimum(flow.length - flow.position, made) * running
    flow.oldest = np.where((flow.position <= flow.trained) & running, flow.version, flow.oldest)
    flow.unsent = np.where((flow.position <= flow.sent) & running, flow.version, flow.unsent)
    flow.position += gained
    over = running & (flow.position >= flow.length)
    flow.send(over if flow.coarse else running)
    for slot in np.nonzero(over)[0]:
        start, end = int(flow.trained[slot]), int(flow.length[slot])
        flow.ended.append(Ended(start, end, int(flow.oldest[slot]), flow.queued))
        flow.length[slot], flow.oldest[slot] = 0, NEVER
        flow.position[slot], flow.trained[slot], flow.sent[slot] = 0, 0, 0


def _admit(flow: Flow, steps: Steps) -> int:
    """Fill empty slots while admission allows it; returns how many were filled."""
    empty = np.nonzero(flow.length == 0)[0]
    begun, waiting = 0, sum(one.end - one.start for one in flow.ended)
    while begun < len(empty) and steps.admits(flow, flow.work.slots - len(empty) + begun, waiting):
        flow.length[empty[begun]] = flow.lengths[flow.leased]
        flow.leased += 1
        begun += 1
    return begun
