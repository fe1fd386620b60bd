"""A contrastive form of self-distillation; `opd.function` of contrast.yaml.

    A    = log q(y | solution) - log p(y) + WEIGHT * (log q(y | solution) - log q(y | another problem's solution))
    loss = -min(rho A, clip(rho) A), rho = p(y) / mu(y)

The last difference is what the right solution says of a token and not any solution; a token that both make likely, or
both unlikely, has none. Alone it has no end: the first one holds the student at q_right (q_right / q_wrong) ** WEIGHT,
normalised, where A is the same for all tokens.
"""

from __future__ import annotations

import torch

from opd_async import LossOutput, LossRows

WEIGHT = 0.5
CLIP = 0.2


def loss(rows: LossRows) -> LossOutput:
    """The loss of a micro-batch's rows, summed."""
    assert rows.teacher_R is not None and rows.contrast_R is not None
    signal = rows.teacher_R - rows.logprobs_R.detach() + WEIGHT * (rows.teacher_R - rows.contrast_R)
    ratio = (rows.logprobs_R - rows.behaviour_R).exp()
    return LossOutput(-torch.minimum(ratio * signal, ratio.clamp(1.0 - CLIP, 1.0 + CLIP) * signal).sum())
