"""How long a step will take, and who waits for whom: a coarse model of a schedule, quick enough to search splits.

    Workload, staleness -> slots as one array, a hundred ticks a step -> Forecast

Generation, scoring and training are flows here: no chunks, no messages, one engine that stands for all, a queue at the
teacher that is a number, a cache that holds everything or nothing. Rules of admission, hold, deadline and step size are
those of `leases`, `step_policy` and `cache_share` in `opd_async.scheduling`. `python -m bench.schedules` runs these
themselves; a test keeps the two within 10 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opd_async.forecast.lengths import LengthStream
from opd_async.forecast.workload import Workload
from opd_async.scheduling.admission import FULL_STEP, FULL_STEP_AT_S1, close_early_tokens
from opd_async.scheduling.cache_share import SENTINEL_EVERY
from opd_async.scheduling.step_policy import LARGEST_STEP

TICKS = 100
WARMUP, STEPS = 8, 16
NEVER = 1 << 30
SENTINELS = 1 / math.log(2) / SENTINEL_EVERY
"""Tokens that sentinels compute again for each new one, where the teacher's cache does not hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(slots=True)
class _Ended:
    """A response that waits to be trained: from where, how long, and the version of its oldest untrained token."""

    start: int
    end: int
    oldest: int
    scored_at: float


@dataclass(slots=True, kw_only=True)
class _Flow:
    """The state between two ticks. Arrays have one element a slot; an empty slot has length 0."""

    work: Workload
    staleness: int
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
    ended: list[_Ended] = field(default_factory=list)
    new: float = 0.0
    """Tokens that have left, each once."""
    queued: float = 0.0
    """Tokens for the teacher to compute, prefixes included."""
    scored: float = 0.0
    """Those that it has computed."""
    settle_at: float = 0.0
    """Computed tokens from which on the next step may begin."""
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
        work=work,
        staleness=staleness,
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
    rates = work.rates()
    tick = work.tokens_per_step / rates.bound / TICKS
    first: NDArray[np.float64] | None = None
    while flow.version < WARMUP + STEPS:
        if flow.version >= WARMUP and first is None:
            first = _totals(flow)
        _tick(flow, tick, rates.teacher)
    assert first is not None
    seconds, tokens, forwarded, train_s, rollout_s, new, computed = (_totals(flow) - first).tolist()
    devices, budgets = work.devices, tokens / work.tokens_per_step
    rates = work.rates(budgets / STEPS)
    device_s = devices.rollout / rates.rollout + devices.teacher / rates.teacher + devices.learner / rates.learner
    return Forecast(
        seconds=seconds / budgets,
        rollout_s=rollout_s / budgets,
        teacher_s=work.tokens_per_step / rates.teacher * computed / new,
        learner_s=train_s / budgets,
        tokens_per_s=tokens / seconds,
        learner_recompute=forwarded / (tokens * (work.mean_tokens + work.prompt_tokens) / work.mean_tokens),
        teacher_recompute=computed / new,
        step_budgets=budgets / STEPS,
        bubble=1 - tokens / seconds * device_s / devices.total,
    )


def _totals(flow: _Flow) -> NDArray[np.float64]:
    sums = (flow.now, flow.step_tokens, flow.forwarded, flow.train_s, flow.rollout_s, flow.new, flow.queued)
    return np.array(sums, np.float64)


def cache_holds(work: Workload) -> bool:
    """Whether the teacher's caches keep every response under way until its end."""
    rates = work.rates()
    under_way = work.slots * work.mean_context
    # what has ended stays until it is the least recently used: as long as a running response goes without a chunk
    ended = rates.bound * work.chunk_tokens * work.slots / rates.rollout
    return work.cache_tokens * work.teachers >= under_way + ended


def _tick(flow: _Flow, seconds: float, score_rate: float) -> None:
    flow.now += seconds
    if flow.now >= flow.resume_at:
        _generate(flow, seconds)
    flow.scored = min(flow.queued, flow.scored + score_rate * seconds)
    budget = flow.work.tokens_per_step
    if flow.now >= flow.step_end:
        flow.version += 1
        flow.step_end = math.inf
        flow.resume_at = flow.now + flow.work.sync_s
        _send(flow, flow.unsent + max(flow.staleness - 1, 1) <= flow.version)
        if flow.staleness == 1:
            flow.settle_at = flow.queued
    elif flow.step_end == math.inf and flow.now >= flow.resume_at and flow.scored >= flow.settle_at:
        due = flow.version - flow.staleness
        if _ready(flow, due) >= budget:
            _step(flow, due)


def _send(flow: _Flow, which: NDArray[np.bool_]) -> None:
    """All tokens of these slots leave for the teacher."""
    new = float((flow.position - flow.sent)[which].sum())
    flow.new += new
    flow.queued += new
    if flow.coarse:
        held = flow.work.cache_tokens * flow.work.teachers
        lost = which & (flow.sent > 0) & (flow.queued - flow.sent_at > held)
        flow.queued += SENTINELS * new + float((flow.sent + flow.work.prompt_tokens)[lost].sum())
    flow.sent = np.where(which, flow.position, flow.sent)
    flow.unsent = np.where(which, NEVER, flow.unsent)
    flow.sent_at = np.where(which, flow.queued, flow.sent_at)


def _ready(flow: _Flow, due: int, chunk: int = 1) -> float:
    """What a step could take; of running responses only whole chunks have left the engine."""
    running = flow.oldest <= due
    chunk = 1 if flow.coarse else chunk
    ended = sum(one.end - one.start for one in flow.ended if one.scored_at <= flow.scored)
    return ended + float(((flow.sent - flow.trained)[running] // chunk).sum() * chunk)


def _generate(flow: _Flow, seconds: float) -> None:
    work = flow.work
    next_step = flow.version + (flow.step_end < math.inf)
    ready = _ready(flow, next_step - flow.staleness, work.chunk_tokens)
    if flow.step_end < math.inf and ready >= close_early_tokens(work.tokens_per_step, flow.staleness):
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
    flow.unsent = np.where((flow.position <= flow.sent) & running, flow.version, flow.unsent)
    flow.position += gained
    over = running & (flow.position >= flow.length)
    _send(flow, over if flow.coarse else running)
    for slot in np.nonzero(over)[0]:
        start, end = int(flow.trained[slot]), int(flow.length[slot])
        flow.ended.append(_Ended(start, end, int(flow.oldest[slot]), flow.queued))
        flow.length[slot], flow.oldest[slot] = 0, NEVER
        flow.position[slot], flow.trained[slot], flow.sent[slot] = 0, 0, 0


def _admit(flow: _Flow, ready: float) -> int:
    """Fill empty slots while admission allows it; returns how many were filled."""
    budget = flow.work.tokens_per_step
    limit = FULL_STEP_AT_S1 if flow.staleness == 1 else FULL_STEP
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
        segments.append((int(flow.trained[slot]), int(flow.sent[slot])))
        flow.trained[slot] = int(flow.sent[slot])
        flow.oldest[slot] = flow.unsent[slot]
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
