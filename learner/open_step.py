"""A step that is trained in parts: what has been added up, and what the last part has to make of it.

    part 0 -> zero the buffers, add its gradient -> part 1 -> add -> ... -> last part -> add, sum over ranks, rescale

Nobody knows how many tokens a step will have before its last part is there. So every part is divided by the tokens of
the first one that has any, and the sum is put right in the end: gradients are linear in the denominator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from opd_async.learner.errors import LearnerError
from opd_async.learner.metrics import Report
from opd_async.transport.step_batch import StepBatch


@dataclass(slots=True, kw_only=True)
class OpenStep:
    """The parts so far of the step at one weight version."""

    parts: int = 0
    denominator: int = 0
    """What the loss of every part is divided by; 0 while no part had a token."""
    tokens: int = 0
    seconds: float = 0.0
    reports: list[Report] = field(default_factory=list)
    """Of every micro-batch: sums and maxima; on the last pipeline stage."""
    held: list[StepBatch] = field(default_factory=list)
    """Parts that wait for the last one."""

    def check(self, batch: StepBatch, version: int) -> None:
        """Raise `LearnerError` unless `batch` is the next part of the step at `version`."""
        if batch.version != version:
            raise LearnerError(f"a batch for weight version {batch.version} reached a learner at {version}")
        if batch.part != self.parts:
            raise LearnerError(f"part {batch.part} of the step at weight version {version} came after {self.parts}")

    def add(self, batch: StepBatch) -> bool:
        """Count a part that is trained now; True for the first with a token, before which the buffers are zeroed."""
        first = self.denominator == 0
        self.denominator = self.denominator or batch.loss_tokens
        self.tokens += batch.loss_tokens
        return first

    def whole(self, batch: StepBatch) -> StepBatch:
        """All that was held and the last part, as a step in one part."""
        parts = [*self.held, batch]
        micro_batches = tuple(micro_batch for part in parts for micro_batch in part.micro_batches)
        return replace(batch, part=0, loss_tokens=sum(part.loss_tokens for part in parts), micro_batches=micro_batches)


@contextmanager
def without_sums(config: Any, *, wanted: bool) -> Iterator[None]:
    """With `wanted`, Megatron's schedules leave gradients as they are on each rank: `config` of the model."""
    finalize = config.finalize_model_grads_func
    if wanted:
        config.finalize_model_grads_func = _leave
    try:
        yield
    finally:
        config.finalize_model_grads_func = finalize


def _leave(model: list[Any], _num_tokens: Tensor | None, **options: Any) -> None:
    """The last part sums over ranks."""


def rescale(ddp: Any, factor: float) -> None:
    """Multiply the gradients in the buffers of Megatron's DDP."""
    if factor != 1.0:
        for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
            buffer.grad_data.mul_(factor)
