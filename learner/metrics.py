"""What a step reports: sums and maxima of the micro-batches, reduced over all ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from opd_async.learner.losses.sampled import MAXIMA, SUMS


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step did, over all ranks. Means are per trained token; logprobs and KL in nats."""

    version: int
    """Weight version after the step."""
    tokens: int
    loss: float
    reverse_kl: float
    """Mean of log p - log q on the sampled tokens: the estimate of KL(student || teacher)."""
    k3: float
    """The same KL by the low-variance estimator exp(d) - d - 1, d = log q - log p."""
    ratio_mean: float
    ratio_std: float
    """Root mean square of rho - 1."""
    ratio_max: float
    clipped_share: float
    gated_share: float
    clamped_share: float
    staleness_mean: float
    """Optimizer steps."""
    staleness_max: int
    student_support: float
    """Mean probability that the student gives to the teacher's top-k; 0 for losses on the sampled token."""
    teacher_support: float
    """The same for the teacher: what the top-k leaves out is 1 minus this."""
    entropy: float
    """Mean entropy of the student, nats; 0 unless there is a bonus for it."""
    reference_kl: float
    """Mean of log p minus the reference's on the sampled tokens; 0 without one."""
    grad_norm: float
    """Before clipping; 0 in a step that trains the critic alone, as is the learning rate."""
    learning_rate: float
    seconds: float
    value_loss: float = 0.0
    """This and the following are 0 without a critic. Means over tokens whose response has a reward, at the beginning of
    the step: half the squared difference between value and return."""
    value_mean: float = 0.0
    explained_variance: float = 0.0
    """Of the returns, by the values."""
    value_clipped_share: float = 0.0
    """In the step's last update of the critic."""
    critic_grad_norm: float = 0.0
    """Before clipping, of that update."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums and maxima over all micro-batches and data-parallel ranks, by the names of `SUMS` and `MAXIMA`."""

    sums: dict[str, float]
    maxima: dict[str, float]


def reduce_over_ranks(reports: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Totals:
    """Add up the (sums, maxima) that the last pipeline stage reported per micro-batch; a collective of all ranks."""
    sums = reduce_sums([micro_sums for micro_sums, _ in reports], len(SUMS), device)
    maxima = torch.zeros(len(MAXIMA), dtype=torch.float64, device=device)
    for _, micro_maxima in reports:
        maxima = torch.maximum(maxima, micro_maxima)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    _from_last_stage(maxima)
    return Totals(dict(zip(SUMS, sums, strict=True)), dict(zip(MAXIMA, maxima.tolist(), strict=True)))


def reduce_sums(reports: Sequence[Tensor], size: int, device: torch.device) -> list[float]:
    """The sum of what the last pipeline stage reported per micro-batch, float64[size] each; a collective of all
    ranks, which all get the same."""
    sums = torch.zeros(size, dtype=torch.float64, device=device)
    for report in reports:
        sums += report
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    _from_last_stage(sums)
    return list(sums.tolist())


def _from_last_stage(tensor: Tensor) -> None:
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() > 1:
        dist.broadcast(tensor, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline)


def step_metrics(version: int, totals: Totals, grad_norm: float, learning_rate: float, seconds: float) -> StepMetrics:
    """The report of a step that led to weight version `version`."""
    tokens = int(totals.sums["tokens"])
    mean = {name: value / tokens for name, value in totals.sums.items()}
    return StepMetrics(
        version=version,
        tokens=tokens,
        loss=mean["loss"],
        reverse_kl=mean["reverse_kl"],
        k3=mean["k3"],
        ratio_mean=mean["ratio"],
        ratio_std=math.sqrt(mean["squared_deviation"]),
        ratio_max=totals.maxima["ratio"],
        clipped_share=mean["clipped"],
        gated_share=mean["gated"],
        clamped_share=mean["clamped"],
        staleness_mean=mean["staleness"],
        staleness_max=int(totals.maxima["staleness"]),
        student_support=mean["student_support"],
        teacher_support=mean["teacher_support"],
        entropy=mean["entropy"],
        reference_kl=mean["reference_kl"],
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        seconds=seconds,
    )


def empty_metrics(version: int) -> StepMetrics:
    """The report of a step without a token, which led to weight version `version`: all figures zero."""
    return StepMetrics(version, 0, **dict.fromkeys(_FIGURES, 0.0), staleness_max=0)


_FIGURES = tuple(
    field.name for field in dataclasses.fields(StepMetrics) if field.name not in ("version", "tokens", "staleness_max")
)
