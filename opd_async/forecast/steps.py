"""How long a step will take, and who waits for whom: a coarse model of a schedule, quick enough to search splits.

    Workload, staleness, rule -> slots as one array, a hundred ticks a step (`flow.py`) -> Forecast

Generation, scoring and training are flows here. Rules of admission, hold, deadline and step size are those of
`admission`, `step_policy`, `filled_steps` and `cache_share` in `opd_async.scheduling`. `python -m bench.schedules` runs
these themselves; a test keeps the two within 10 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd_async.config.topology import StepRule
from opd_async.forecast.deadline_flow import DeadlineSteps
from opd_async.forecast.filled_flow import FilledFlow
from opd_async.forecast.flow import Flow, Steps, begin, tick
from opd_async.forecast.workload import Workload

TICKS = 100
WARMUP, STEPS = 8, 16


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


def forecast(work: Workload, staleness: int | None, rule: StepRule = StepRule.DEADLINE) -> Forecast:
    """Steps by `rule` with bound `staleness` under `work`; None, no bound, with filled steps alone.

    Raises `ValueError` for deadline cuts without a bound, and for those with 0, where every step drains.
    """
    steps: Steps
    if rule is StepRule.FILLED:
        steps = FilledFlow(work.tokens_per_step, staleness)
    elif not staleness:
        raise ValueError("a forecast of deadline cuts needs a max_staleness of at least 1")
    else:
        steps = DeadlineSteps(work.tokens_per_step, staleness)
    flow, rates = begin(work, staleness), work.rates()
    seconds = work.tokens_per_step / rates.bound / TICKS
    first: NDArray[np.float64] | None = None
    while flow.version < WARMUP + STEPS:
        if flow.version >= WARMUP and first is None:
            first = _totals(flow)
        tick(flow, steps, seconds, rates.teacher)
    assert first is not None
    return _figures(work, _totals(flow) - first)


def _totals(flow: Flow) -> NDArray[np.float64]:
    sums = (flow.now, flow.step_tokens, flow.forwarded, flow.train_s, flow.rollout_s, flow.new, flow.queued)
    return np.array(sums, np.float64)


def _figures(work: Workload, sums: NDArray[np.float64]) -> Forecast:
    """What came of `STEPS` steps with these sums."""
    seconds, tokens, forwarded, train_s, rollout_s, new, computed = sums.tolist()
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
