"""A contrastive form of self-distillation; `opd.function` of contrast.yaml.

    signal = log q(y | the problem's solution) - log q(y | another problem's)       what the right hint makes of y
    loss   = -min(rho A, clip(rho) A), A = signal between -5 and 5, rho = p(y) / mu(y)

What both hints do to a token alike, that the text is an addition at all, is in both scores and goes away.
"""

from __future__ import annotations

import torch

from opd_async import LossOutput, LossRows

MOST = 5.0
"""Most that one token may ask for, nats."""
CLIP = 0.2


def loss(rows: LossRows) -> LossOutput:
    """The loss of a micro-batch's rows, summed."""
    assert rows.teacher_R is not None and rows.contrast_R is not None
    signal = (rows.teacher_R - rows.contrast_R).clamp(-MOST, MOST)
    ratio = (rows.logprobs_R - rows.behaviour_R).exp()
    return LossOutput(-torch.minimum(ratio * signal, ratio.clamp(1.0 - CLIP, 1.0 + CLIP) * signal).sum())
