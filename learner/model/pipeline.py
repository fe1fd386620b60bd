"""Drive micro-batches through the pipeline stages with Megatron's schedule, forward and backward or forward alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from opd_async.learner.model.layout import PackedBatch
from opd_async.learner.progress import PROGRESS

LastStage = Callable[[int, Tensor], tuple[Tensor, Any]]
"""(index of the micro-batch, hidden states [P, 1, hidden] of the last stage) -> (loss, what to report)."""


def run_schedule(model: Any, packs: Sequence[PackedBatch], last_stage: LastStage, *, train: bool) -> list[Any]:
    """What `last_stage` reported for each micro-batch; empty but on the last stage.

    All ranks call it, with the same number of micro-batches. With `train`, every loss is differentiated and gradients
    are finalised as the model's config says; without it, the caller switches gradients off.
    """

    def forward_step(source: Iterator[tuple[int, PackedBatch]], part: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        index, packed = next(source)
        PROGRESS.made()

        def finish(hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
            loss, report = last_stage(index, hidden)
            # Megatron adds up a token count that nobody reads: the loss is normalised already
            return loss, torch.zeros((), dtype=torch.int), report

        return part(packed), finish

    reports: list[Any] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(packs)),
        model=[model],
        num_microbatches=len(packs),
        seq_length=1,  # unused: micro-batches announce their length between pipeline stages
        micro_batch_size=1,
        forward_only=not train,
    )
    return reports
