"""How long a step will take, and who waits for whom: a coarse model of a schedule, quick enough for a planner.

    Workload, staleness -> slots as one array, a hundred ticks a step -> Forecast

Generation, scoring and training are flows here: no chunks, no messages, one engine that stands for all, a queue at the
teacher that is a number. Rules of admission, hold, deadline and step size are those of `opd_async.leases` and
`opd_async.schedule`. `python -m bench.schedules` runs these themselves; a test keeps the two within 10 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opd_async.leases import NEXT_STEP, NEXT_STEP_FORCED
from opd_async.lengths import LengthStream
from opd_async.schedule import LARGEST_STEP
from opd_async.workload import Workload

TICKS = 100
WARMUP, STEPS = 8, 16
NEVER = 1 << 30


@dataclass(frozen=True, slots=True)
class Forecast:
    """For each `tokens_per_step` trained tokens: `seconds` pass, in which the stages compute for `*_s`."""

    seconds: float
    rollout_s: float
    teacher_s: float
    learner_s: float
    tokens_per_s: float
    learner_recompute: float
    teacher_recompute: float
    step_budgets: float
    """Tokens of a step relative to `tokens_per_step`: more than 1 where the learner is behind."""
    bubble: float
    """Share of all devices' time that full speed would not have needed."""

    @property
    def bottleneck(self) -> str:
        """The stage that computes for most of the time."""
        return max(("rollout", "teacher", "learner"), key=lambda stage: getattr(self, f"{stage}_s"))


@dataclass(slots=True)
class _Ended:
    """A response that waits to be trained: from where, how long, and the version of its oldest untrained token."""

    start: int
    end: int
    oldest: int
    scored_at: float


@dataclass(slots=True)
class _Flow:
    """The state between two ticks. Arrays have one element a slot; an empty slot has length 0."""

    work: Workload
    staleness: int
    lengths: LengthStream
    position: NDArray[np.float64]
    length: NDArray[np.int64]
    trained: NDArray[np.float64]
    oldest: NDArray[np.int64]
    now: float = 0.0
    version: int = 0
    leased: int = 0
    ended: list[_Ended] = field(default_factory=list)
    made: float = 0.0
    scored: float = 0.0
    settle_at: float = 0.0
    """Scored tokens from which on the next step may begin."""
    step_end: float = math.inf
    resume_at: float = 0.0
    step_tokens: float = 0.0
    forwarded: float = 0.0
    train_s: float = 0.0
    rollout_s: float = 0.0


def forecast(work: Workload, staleness: int) -> Forecast:
    """Deadline cuts with bound `staleness` >= 1 under `work`; `ValueError` below 1, where every step drains."""
    if staleness < 1:
        raise ValueError("a forecast needs max_staleness >= 1")
    slots = work.slots
    flow = _Flow(
        work,
        staleness,
        LengthStream(work.lengths, 0, work.group_size, work.correlation),
        np.zeros(slots),
        np.zeros(slots, np.int64),
        np.zeros(slots),
        np.full(slots, NEVER),
    )
    teacher_recompute = expected_teacher_recompute(work)
    rates = work.rates()
    tick = work.tokens_per_step / rates.bound / TICKS
    first: tuple[float, ...] = ()
    while flow.version < WARMUP + STEPS:
        if flow.version >= WARMUP and not first:
            first = (flow.now, flow.step_tokens, flow.forwarded, flow.train_s, flow.rollout_s)
        _tick(flow, tick, rates.teacher / teacher_recompute, (teacher_recompute - 1) * math.log(2))
    last = (flow.now, flow.step_tokens, flow.forwarded, flow.train_s, flow.rollout_s)
    seconds, tokens, forwarded, train_s, rollout_s = (b - a for a, b in zip(first, last, strict=True))
    devices, budgets = work.devices, tokens / work.tokens_per_step
    device_s = devices.rollout / rates.rollout + devices.teacher / rates.teacher + devices.learner / rates.learner
    return Forecast(
        seconds / budgets,
        rollout_s / budgets,
        work.tokens_per_step / rates.teacher * teacher_recompute,
        train_s / budgets,
        tokens / seconds,
        forwarded / (tokens * (work.mean_tokens + work.prompt_tokens) / work.mean_tokens),
        teacher_recompute,
        budgets / STEPS,
        1 - tokens / seconds * device_s / devices.total,
    )


def expected_teacher_recompute(work: Workload) -> float:
    """Tokens that the teacher computes for each that is new: 1 where its caches hold all responses under way, and up
    to 1 + 1 / ln 2 where they hold none: cut points double then (`opd_async.growth`)."""
    rates = work.rates()
    under_way = work.slots * work.mean_context
    # what has ended stays until it is the least recently used: as long as a running response goes without a chunk
    ended = rates.bound * work.chunk_tokens * work.slots / rates.rollout
    missing = max(0.0, 1 - work.cache_tokens * work.teachers / (under_way + ended))
    return 1 + missing / math.log(2)


def _tick(flow: _Flow, seconds: float, score_rate: float, missing: float) -> None:
    flow.now += seconds
    if flow.now >= flow.resume_at:
        _generate(flow, seconds)
    flow.scored = min(flow.made, flow.scored + score_rate * seconds)
    budget = flow.work.tokens_per_step
    if flow.now >= flow.step_end:
        flow.version += 1
        flow.step_end = math.inf
        flow.resume_at = flow.now + flow.work.sync_s
        if flow.staleness == 1:
            flow.settle_at = flow.made
            # every chunk that the update flushed is scored at once, whatever has been forgotten of its prefix
            flow.scored -= missing * float(flow.position.sum())
    elif flow.step_end == math.inf and flow.now >= flow.resume_at and flow.scored >= flow.settle_at:
        due = flow.version - flow.staleness
        if _ready(flow, due) >= budget:
            _step(flow, due)


def _ready(flow: _Flow, due: int, chunk: int = 1) -> float:
    """What a step could take; of running responses only whole chunks have left the engine."""
    running = flow.oldest <= due
    ended = sum(one.end - one.start for one in flow.ended if one.scored_at <= flow.scored)
    return ended + float(((flow.position - flow.trained)[running] // chunk).sum() * chunk)


def _generate(flow: _Flow, seconds: float) -> None:
    work = flow.work
    next_step = flow.version + (flow.step_end < math.inf)
    ready = _ready(flow, next_step - flow.staleness, work.chunk_tokens)
    if flow.step_end < math.inf and ready >= 2 * flow.staleness * work.tokens_per_step:
        return
    begun = _admit(flow, ready)
    running = flow.length > 0
    active = int(running.sum())
    if not active:
        return
    flow.rollout_s += seconds
    seconds = max(seconds - work.prefill.tokens_s(0, work.prompt_tokens) * begun / work.engines, 0.0)
    cached = float(flow.position[running].sum()) + active * work.prompt_tokens
    steps = work.decode.steps(seconds, max(1, round(active / work.engines)), cached / work.engines)
    gained = np.minimum(flow.length - flow.position, steps) * running
    flow.oldest = np.where((flow.position <= flow.trained) & running, flow.version, flow.oldest)
    flow.position += gained
    flow.made += float(gained.sum())
    for slot in np.nonzero(running & (flow.position >= flow.length))[0]:
        start, end = int(flow.trained[slot]), int(flow.length[slot])
        flow.ended.append(_Ended(start, end, int(flow.oldest[slot]), flow.made))
        flow.length[slot], flow.position[slot], flow.trained[slot], flow.oldest[slot] = 0, 0, 0, NEVER


def _admit(flow: _Flow, ready: float) -> int:
    """Fill empty slots as far as admission lets; returns how many."""
    budget = flow.work.tokens_per_step
    limit = NEXT_STEP_FORCED if flow.staleness == 1 else NEXT_STEP
    if flow.step_end < math.inf and ready >= limit * budget:
        return 0
    if sum(one.end - one.start for one in flow.ended) >= flow.staleness * budget:
        return 0
    empty = np.nonzero(flow.length == 0)[0]
    for slot in empty:
        flow.length[slot] = flow.lengths[flow.leased]
        flow.leased += 1
    return len(empty)


def _step(flow: _Flow, due: int) -> None:
    """Train what is forced and what has ended, as `DeadlineCuts.choose` does."""
    train, prompt = flow.work.train, flow.work.prompt_tokens
    segments: list[tuple[int, int]] = []
    for slot in np.nonzero(flow.oldest <= due)[0]:
        segments.append((int(flow.trained[slot]), int(flow.position[slot])))
        flow.trained[slot] = int(flow.position[slot])
        flow.oldest[slot] = NEVER
    flow.ended.sort(key=lambda one: one.oldest)
    tokens, later = sum(end - start for start, end in segments), []
    for one in flow.ended:
        full = tokens >= LARGEST_STEP * flow.work.tokens_per_step
        if one.scored_at > flow.scored or (full and one.oldest > due):
            later.append(one)
            continue
        segments.append((one.start, one.end))
        tokens += one.end - one.start
    flow.ended = later
    seconds = train.floor_s + sum(train.segment_s(prompt + end, end - start) for start, end in segments)
    flow.step_tokens += tokens
    flow.forwarded += sum(prompt + end for _, end in segments)
    flow.train_s += seconds
    flow.step_end = flow.now + seconds
