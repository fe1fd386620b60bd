"""What a critic learns: values towards returns, squared, with a bound on how far one step moves a value.

R rows (response tokens); V the value under the current weights, with gradient, V_old that at the beginning of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd_async.learner.losses.sampled import weighted

VALUE_SUMS = ("rows", "loss", "value", "return", "squared_return", "error", "squared_error", "clipped")
"""What is summed over rows whose response has a reward; values, returns and errors (return - V_old) of the old
values."""


@dataclass(frozen=True, slots=True)
class ValueRows:
    """What the critic is to learn from R rows."""

    old_R: Tensor
    """float32[R]: V_old."""
    returns_R: Tensor
    """float32[R]"""
    known_R: Tensor
    """bool[R]: whether the response has a reward; other rows teach nothing."""
    weights_R: Tensor | None
    """float32[R]: how often each row counts in the loss; None: once each."""


def value_loss(values_R: Tensor, rows: ValueRows, clip: float | None) -> tuple[Tensor, Tensor]:
    """The loss, summed over rows, to be divided by the step's token count; and float64[len(VALUE_SUMS)].

        1/2 max((V - return)^2, (V_old + clamp(V - V_old, +-clip) - return)^2)

    A value that has left V_old by more than `clip` towards its return has no gradient any more; one that was moved away
    from it still has. The first update of a step starts at V_old, where the bound cannot act.
    Source: the PPO of OpenAI's baselines, 1/2 included; slime leaves the 1/2 out, and 1707.06347 has no such clip.
    """
    error_R = (values_R - rows.returns_R).square()
    clipped_R = torch.zeros_like(rows.known_R)
    if clip is not None:
        bounded_R = rows.old_R + (values_R - rows.old_R).clamp(-clip, clip)
        bounded_error_R = (bounded_R - rows.returns_R).square()
        clipped_R = bounded_error_R > error_R
        error_R = torch.maximum(error_R, bounded_error_R)
    loss = weighted(0.5 * error_R * rows.known_R, rows.weights_R).sum()
    return loss, _sums(loss, clipped_R, rows)


@torch.no_grad()
def _sums(loss: Tensor, clipped_R: Tensor, rows: ValueRows) -> Tensor:
    known_R = rows.known_R.double()
    old_R, returns_R = rows.old_R.double() * known_R, rows.returns_R.double() * known_R
    error_R = returns_R - old_R
    columns = (known_R, old_R, returns_R, returns_R**2, error_R, error_R**2, clipped_R * known_R)
    count, *others = (column_R.sum() for column_R in columns)
    return torch.stack([count, loss.double(), *others])
