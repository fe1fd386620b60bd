"""Workloads to simulate: balanced ones without units, and real models on real devices.

A balanced workload has a student engine whose decode step takes 8 ms + 0.05 ms for each request (what an 8-billion
model takes on an H100 without keys and values), a teacher and a learner that are exactly as fast, and responses with a
heavy tail: the hardest case for a schedule, since no stage has time to spare. The real ones are computed by
`opd_async.forecast.cost_model` from shapes and data sheets; docs/measurements.md has their arithmetic.
"""

from __future__ import annotations

import dataclasses

from opd_async.bench.sim.tools import Tools
from opd_async.forecast.cost_model import (
    QWEN3_8B,
    QWEN3_30B_A3B,
    QWEN3_32B,
    DecodeCost,
    Decoder,
    PrefillCost,
    TrainCost,
    decode_cost,
    engine_cache_tokens,
    prefill_cost,
    sync_seconds,
    train_cost,
)
from opd_async.forecast.devices import H100, H200, NETWORK_400G, NVLINK, Device, Link
from opd_async.forecast.lengths import Lengths, LogNormal, Zipf, typical
from opd_async.forecast.workload import Devices, Workload

HEAVY = LogNormal(2000, 16000, 16384)
MEDIUM = LogNormal(2000, 8000, 16384)
LONG = LogNormal(4000, 32000, 32768)
ZIPF = Zipf(600, 1.2, 16384)
CUT = LogNormal(2000, 16000, 512)
"""Nearly all responses go to their limit: a student that does not end by itself yet, or a limit that is too small."""
SLOTS = 256
PROMPT = 200
SCORE_FLOOR_S = 0.01
BATCH_TOKENS = 2048


def balanced(
    lengths: Lengths = HEAVY, ratio: float = 1.0, learner: float = 1.0, teacher: float = 1.0, slots: int = SLOTS
) -> Workload:
    """`ratio` * `slots` responses a step; `learner` and `teacher` are speeds relative to the rollout's."""
    mean = float(typical(lengths).mean())
    decode = DecodeCost(8e-3, 5e-5)
    rate = slots / decode.seconds(1, slots, 0)
    token_s = mean / (mean + PROMPT) / rate
    floor_share = SCORE_FLOOR_S * rate * teacher / BATCH_TOKENS
    return Workload(
        lengths=lengths,
        decode=decode,
        prefill=PrefillCost(0.0, 0.0),
        score=PrefillCost(SCORE_FLOOR_S, token_s / teacher * (1 - floor_share)),
        train=TrainCost(0.0, token_s / learner),
        sync_s=0.5,
        slots=slots,
        samples_per_step=round(slots * ratio),
        prompt_tokens=PROMPT,
        batch_tokens=BATCH_TOKENS,
    )


def real(
    student: Decoder, teacher: Decoder, device: Device, link: Link, devices: Devices, teacher_parallel: int
) -> Workload:
    """One student engine a device, teacher engines of `teacher_parallel` devices, 32 slots an engine."""
    return Workload(
        lengths=HEAVY,
        decode=decode_cost(student, device),
        prefill=prefill_cost(student, device, with_head=False),
        score=prefill_cost(teacher, device, teacher_parallel),
        train=train_cost(student, device, devices.learner, recompute=True),
        sync_s=sync_seconds(student, link),
        engines=devices.rollout,
        teachers=devices.teacher // teacher_parallel,
        slots=32 * devices.rollout,
        samples_per_step=32 * devices.rollout,
        prompt_tokens=PROMPT,
        cache_tokens=engine_cache_tokens(teacher, device, teacher_parallel),
        devices=devices,
    )


PRESETS: dict[str, Workload] = {
    "heavy-tail": balanced(),
    "medium-tail": balanced(MEDIUM),
    "long": balanced(LONG),
    "zipf": balanced(ZIPF),
    "correlated": dataclasses.replace(balanced(), group_size=8, correlation=0.5),
    "fast-learner": balanced(learner=2.0),
    "limit": dataclasses.replace(balanced(CUT, ratio=0.25, slots=64), sync_s=0.05),
    "tools": balanced(),
    "qwen3-8b-32b-h100": real(QWEN3_8B, QWEN3_32B, H100, NVLINK, Devices(8, 4, 4), 2),
    "qwen3-8b-30b-a3b-h200": real(QWEN3_8B, QWEN3_30B_A3B, H200, NETWORK_400G, Devices(8, 1, 4), 1),
}

TOOLS: dict[str, Tools] = {"tools": Tools(turn_tokens=500.0, shortest_s=0.1, longest_s=60.0)}
"""Of the presets whose responses are episodes."""
