"""Norms and gates by the Triton kernels of Liger (package liger-kernel), each of the learner's own formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opd_async.learner.model import gated


def norm(hidden: Tensor, weight: Tensor, eps: float, *, centred: bool) -> Tensor:
    """RMSNorm as `norm.in_parts` rounds it, in one kernel: Gemma's too, whose weights are stored less 1."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    offset, casting = (1.0, "gemma") if centred else (0.0, "llama")
    # in place, it would write its gradient over that of its output, which a residual shares
    in_place = False
    normed: Tensor = LigerRMSNormFunction.apply(hidden, weight, eps, offset, casting, in_place, None)
    return normed


def gate(both: Tensor, activation: gated.Activation) -> Tensor:
    """`both` [..., 2 F], gates and ups -> [..., F], in one kernel each way; for GELU torch's.

    Liger's for GELU takes gates and ups apart, and so copies both.
    """
    if activation is not gated.SILU:
        return gated.by_torch(both, activation)
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    rows: Any = both.view(-1, both.shape[-1])  # the gradient comes back as rows
    made: Tensor = LigerFusedGateUpSiLUMulFunction.apply(rows)
    return made.view(*both.shape[:-1], -1)
