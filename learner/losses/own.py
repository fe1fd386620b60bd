"""A loss of the user's own (`opd.function`), in place of the configured one.

    micro-batch -> LossRows -> function -> LossOutput -> the step's gradient

It is called on every rank, for each micro-batch; ranks of one tensor-parallel group see the same rows and must return
the same loss. What is reported of ratios, divergences and ages stays that of the configured loss.
Shape suffixes: R trained rows, K the teacher's most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_async.hooks import HookError, add_working_directory, blame, load_hook
from opd_async.learner.losses.logprobs import RowLogprobs
from opd_async.learner.losses.sampled import LossOutput as BuiltIn
from opd_async.learner.model.layout import PackedBatch

KEY = "opd.function"
NAMED = 8
"""How many samples a message names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRows:
    """The R trained rows (tokens) of a micro-batch: float32[R] in nats where nothing else is said.

    Only `logprobs_R` and `student_topk_RK` have a gradient.
    """

    logprobs_R: Tensor
    """The student's log-probability of the token, under the current weights."""
    behaviour_R: Tensor
    """The same under the weights that sampled the token, as the engine reported it."""
    teacher_R: Tensor | None
    """The teacher's; None without a teacher."""
    contrast_R: Tensor | None
    """The teacher's behind `data.contrast_prompt`; None without one."""
    advantages_R: Tensor
    """The estimator's advantage; 0 without one."""
    staleness_R: Tensor
    """int64[R]: age of the token in optimizer steps."""
    sequence_R: Tensor
    """int64[R], ascending: which response of the micro-batch a row belongs to."""
    weights_R: Tensor | None
    """How often a row counts in the loss; None: once."""
    topk_ids_RK: Tensor | None
    """int64[R, K]: the teacher's most likely tokens, where `opd.loss` is one that has them on the wire; else None."""
    topk_logprobs_RK: Tensor | None
    """float32[R, K]: the teacher's log-probabilities of these tokens."""
    student_topk_RK: Tensor | None
    """float32[R, K]: the student's, with gradient."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What a loss function returns."""

    loss: Tensor
    """A float scalar with gradient: the sum over the rows. The learner divides it by the tokens of the step."""


def with_loss(output: BuiltIn, loss: Tensor) -> BuiltIn:
    """What is reported of the configured loss, with another loss to learn from."""
    counted = torch.stack([loss.detach().double(), output.sums["loss"][1]])
    return replace(output, loss=loss, sums=output.sums | {"loss": counted})


def _named(sample_ids_N: NDArray[np.int64] | None) -> str:
    """The samples of a micro-batch as words for a message: the first few of them."""
    if sample_ids_N is None or not len(sample_ids_N):
        return "no sample"
    named = ", ".join(map(str, sample_ids_N[:NAMED].tolist()))
    return f"sample{'s' * (len(sample_ids_N) > 1)} {named}{', ...' * (len(sample_ids_N) > NAMED)}"


class OwnLoss:
    """The user's function, loaded; called with a micro-batch, it returns a loss that can be trained on."""

    def __init__(self, path: str) -> None:
        """Load `module:name`; raises `InputError` if that cannot be done."""
        add_working_directory()
        self._path = path
        self._function: Callable[[LossRows], LossOutput] = load_hook(KEY, path)

    def __call__(self, packed: PackedBatch, found: RowLogprobs) -> Tensor:
        """The loss of the micro-batch's rows, summed.

        Raises `HookError` when the function raises, or returns what cannot be trained on.
        """
        rows = LossRows(
            logprobs_R=found.sampled_R,
            behaviour_R=packed.behaviour_R,
            teacher_R=packed.teacher_R,
            contrast_R=packed.contrast_R,
            advantages_R=packed.advantages_R,
            staleness_R=packed.staleness_R,
            sequence_R=packed.sequence_R,
            weights_R=packed.weights_R,
            topk_ids_RK=packed.topk_ids_RK,
            topk_logprobs_RK=packed.topk_logprobs_RK,
            student_topk_RK=found.support_RK if packed.topk_ids_RK is not None else None,
        )
        count = len(packed.targets_R)
        given = f"{_named(packed.sample_ids_N)}, a micro-batch of {count} rows"
        try:
            output = self._function(rows)
        except Exception as error:  # the edge of the user's code
            raise blame(KEY, self._path, given, error) from error
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(output)
            raise self._wrong(given, f"returned {shape[:100]}, but LossOutput(loss) has a float scalar")
        if count and torch.is_grad_enabled() and not loss.requires_grad:
            raise self._wrong(given, "returned a loss without gradient; compute it from rows.logprobs_R")
        if not torch.isfinite(loss.detach()).all():
            raise self._wrong(given, f"returned the loss {loss.item()}")
        # of no rows there is nothing to learn, but every rank must have a gradient to reduce
        return loss.reshape(()) if count else found.sampled_R.sum()

    def _wrong(self, given: str, what: str) -> HookError:
        return HookError(f"{KEY}: {self._path} {what} (given {given}); mend the function, and go on with --resume")
