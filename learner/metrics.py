"""What a step reports: sums and maxima of the micro-batches, reduced over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

SUMS = (
    *("loss", "reverse_kl", "k3", "ratio", "squared_deviation", "clipped", "gated", "clamped", "staleness"),
    *("student_support", "teacher_support", "entropy", "reference_kl"),
    *("plain_kl", "contrast", "divergence_clipped", "frequent_signal", "fork_entropy"),
)
"""What losses may report as a sum over rows (`LossOutput.sums`)."""
MAXIMA = ("ratio", "staleness")
"""What losses report as a maximum over rows, at least 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What one step did, over all ranks. Means are per trained token; logprobs and KL in nats.

    None stands for what was not computed: it is left out of files and metrics.
    """

    version: int
    """Weight version after the step."""
    tokens: int
    loss: float | None = None
    """This and all that follow but the seconds are None in a step without a token."""
    reverse_kl: float | None = None
    """KL(student || teacher) at the prefixes of the step: exact where the loss is that over the whole vocabulary, else
    the mean of rho (log p - log q) on the sampled tokens, rho = p / mu. None without a teacher, or a sampled token."""
    k3: float | None = None
    """The same KL by the low-variance estimator rho (exp(d) - d - 1), d = log q - log p."""
    ratio_mean: float | None = None
    """Of the sampled tokens, as all ratios: None where a data set gives every token."""
    ratio_std: float | None = None
    """Root mean square of rho - 1."""
    ratio_max: float | None = None
    clipped_share: float | None = None
    gated_share: float | None = None
    """Of tokens that `opd.mismatch` dropped, or whose ratio it bounded."""
    clamped_share: float | None = None
    staleness_mean: float | None = None
    """Optimizer steps."""
    staleness_max: int | None = None
    student_support: float | None = None
    """Mean probability that the student gives to the teacher's top-k; None for losses without one."""
    teacher_support: float | None = None
    """The same for the teacher: what the top-k leaves out is 1 minus this."""
    entropy: float | None = None
    """Mean entropy of the student, nats; None unless there is a bonus for it, or teachers read what it does not."""
    fork_entropy: float | None = None
    """The same at the fifth of each micro-batch's tokens where it is highest: where a response forks. None where
    teachers read what the student reads."""
    reference_kl: float | None = None
    """KL(student || reference) by the mean of rho (log p - log p_ref) on the sampled tokens; None without one."""
    plain_kl: float | None = None
    """The same KL to the teacher behind the student's own prompts; None but in steps that compute it."""
    contrast: float | None = None
    """Mean of log q - log q_contrast, the teacher's behind its prompt and behind the contrast's; None without one."""
    divergence_clipped_share: float | None = None
    """Of tokens whose divergence `opd.divergence_clip` bounded."""
    frequent_signal_share: float | None = None
    """Of the signal (the divergence, or |log q - log p|) on the most frequent tokens of each micro-batch; None where
    teachers read what the student reads."""
    grad_norm: float | None = None
    """Before clipping; None in a step that trains the critic alone."""
    learning_rate: float | None = None
    """0 in such a step."""
    seconds: float = 0.0
    value_loss: float | None = None
    """This and the following are None without a critic. Means over tokens whose response has a reward, at the beginning
    of the step: half the squared difference between value and return. None where no response has a reward."""
    value_mean: float | None = None
    explained_variance: float | None = None
    """Of the returns, by the values; None where returns do not differ."""
    value_clipped_share: float | None = None
    """In the step's last update of the critic."""
    critic_grad_norm: float | None = None
    """Before clipping, of that update."""

    def known(self) -> dict[str, float]:
        """What was computed, by name."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: float(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums and maxima over all micro-batches and data-parallel ranks."""

    sums: dict[str, float]
    """By the names of `SUMS`; 0 where nothing was reported."""
    rows: dict[str, float]
    """Over how many rows each sum is."""
    maxima: dict[str, float]
    """By the names of `MAXIMA`."""

    @property
    def tokens(self) -> int:
        """How many rows were trained."""
        return int(self.rows["loss"])

    def mean(self, name: str) -> float | None:
        """The sum of that name per row; None where no row has it."""
        return self.sums[name] / self.rows[name] if self.rows[name] else None


Report = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""`LossOutput.sums` and `LossOutput.maxima` of a micro-batch."""


def reduce_over_ranks(reports: Sequence[Report], device: torch.device) -> Totals:
    """Add up what the last pipeline stage reported per micro-batch; a collective of all ranks.

    Raises `KeyError` for a name that is not in `SUMS`.
    """
    flat = reduce_sums([_vector(sums) for sums, _ in reports], 2 * len(SUMS), device)
    maxima = torch.zeros(len(MAXIMA), dtype=torch.float64, device=device)
    for _, of_batch in reports:
        maxima = torch.maximum(maxima, torch.stack([of_batch[name] for name in MAXIMA]))
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=parallel_state.get_data_parallel_group())
    _from_last_stage(maxima)
    return Totals(
        sums=dict(zip(SUMS, flat[::2], strict=True)),
        rows=dict(zip(SUMS, flat[1::2], strict=True)),
        maxima=dict(zip(MAXIMA, maxima.tolist(), strict=True)),
    )


def _vector(sums: Mapping[str, Tensor]) -> Tensor:
    """float64[2 len(SUMS)]: sum and rows of each name in turn, zero for those that are not there."""
    if unknown := set(sums) - set(SUMS):
        raise KeyError(f"{', '.join(sorted(unknown))}: reported by a loss, and not in opd_async.learner.metrics.SUMS")
    nothing = torch.zeros_like(sums["loss"])
    return torch.cat([sums.get(name, nothing) for name in SUMS])


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


def step_metrics(
    version: int, totals: Totals, *, grad_norm: float | None, learning_rate: float, seconds: float
) -> StepMetrics:
    """The report of a step that led to weight version `version`, without what the critic says."""
    squared_deviation = totals.mean("squared_deviation")
    return StepMetrics(
        version=version,
        tokens=totals.tokens,
        loss=totals.mean("loss"),
        reverse_kl=totals.mean("reverse_kl"),
        k3=totals.mean("k3"),
        ratio_mean=totals.mean("ratio"),
        ratio_std=None if squared_deviation is None else math.sqrt(squared_deviation),
        ratio_max=totals.maxima["ratio"] if totals.rows["ratio"] else None,
        clipped_share=totals.mean("clipped"),
        gated_share=totals.mean("gated"),
        clamped_share=totals.mean("clamped"),
        staleness_mean=totals.mean("staleness"),
        staleness_max=int(totals.maxima["staleness"]),
        student_support=totals.mean("student_support"),
        teacher_support=totals.mean("teacher_support"),
        entropy=totals.mean("entropy"),
        fork_entropy=totals.mean("fork_entropy"),
        reference_kl=totals.mean("reference_kl"),
        plain_kl=totals.mean("plain_kl"),
        contrast=totals.mean("contrast"),
        divergence_clipped_share=totals.mean("divergence_clipped"),
        frequent_signal_share=totals.mean("frequent_signal"),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        seconds=seconds,
    )
