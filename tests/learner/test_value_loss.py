"""The value loss by hand: where the clip acts, and what counts."""

from __future__ import annotations

import pytest
import torch

from opd_async.learner.critic.critic import explained_variance
from opd_async.learner.critic.value_loss import VALUE_SUMS, ValueRows, value_loss

OLD = torch.tensor([1.0, 1.0, 1.0, 1.0])
VALUES = [1.1, 1.5, 0.5, 7.0]
RETURNS = torch.tensor([2.0, 2.0, 2.0, 2.0])
KNOWN = torch.tensor([True, True, True, False])


def test_by_hand() -> None:
    """Row 0 is inside; row 1 has moved past the clip towards its return, row 2 away from it; row 3 has no reward."""
    values = torch.tensor(VALUES, requires_grad=True)
    loss, sums = value_loss(values, ValueRows(OLD, RETURNS, KNOWN, None), 0.2)
    assert float(loss.detach()) == pytest.approx(0.5 * (0.9**2 + 0.8**2 + 1.5**2))
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, torch.tensor([-0.9, 0.0, -1.5, 0.0]))
    found = dict(zip(VALUE_SUMS, sums.tolist(), strict=True))
    assert (found["rows"], found["value"], found["return"], found["error"], found["clipped"]) == (3, 3, 6, 3, 1)


def test_without_a_clip_and_with_weights() -> None:
    values = torch.tensor(VALUES, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 1.0, 1.0])
    loss, _ = value_loss(values, ValueRows(OLD, RETURNS, KNOWN, weights), None)
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, torch.tensor([-0.9, -1.0, -1.5, 0.0]))


def test_explained_variance() -> None:
    def of(old: list[float], returns: list[float]) -> float | None:
        known = torch.ones(len(old), dtype=torch.bool)
        rows = ValueRows(torch.tensor(old), torch.tensor(returns), known, None)
        _, sums = value_loss(rows.old_R, rows, None)
        return explained_variance(dict(zip(VALUE_SUMS, sums.tolist(), strict=True)))

    assert of([1.0, 3.0], [1.0, 3.0]) == 1.0
    assert of([0.5, 0.5], [1.0, 3.0]) == 0.0  # always the same, and off
    assert of([3.0, 1.0], [1.0, 3.0]) == -3.0
    assert of([1.0, 3.0], [2.0, 2.0]) is None  # there is nothing to explain
