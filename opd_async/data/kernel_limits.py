"""Which packages compute with `learner.kernels`, and which models they cannot compute. No torch."""

from __future__ import annotations

from opd_async.data.decoder import SILU, ModelShape

PARTS = {
    "liger": {
        "liger_kernel.ops.rms_norm": "LigerRMSNormFunction",
        "liger_kernel.ops.swiglu": "LigerFusedGateUpSiLUMulFunction",
    },
    "te": {"transformer_engine.pytorch": "DotProductAttention"},
}
"""What the learner takes from each package: a name of each module."""
PACKAGES = {"liger": "liger-kernel", "te": "transformer-engine[pytorch]"}
"""What to install."""
WIDEST_ROW = 65536
"""Liger keeps a row in one block."""
WIDEST_HEAD, HEAD_STEP = 256, 8
"""Of the fused attention kernels that Transformer Engine chooses from."""


def kernel_problem(kernels: str, shape: ModelShape, tensor_parallel: int) -> str | None:
    """Why the kernels cannot compute a model that is split over so many ranks; None if they can.

    Limits of the GPU itself are not known here: the learner tries its attention before it starts.
    """
    if kernels == "te" and (shape.head_dim > WIDEST_HEAD or shape.head_dim % HEAD_STEP):
        return (
            f"te, whose attention takes heads of at most {WIDEST_HEAD} channels, a multiple of {HEAD_STEP}, and this "
            f"model's have {shape.head_dim}; write auto"
        )
    if kernels != "liger":
        return None
    gate = shape.ffn // tensor_parallel if shape.experts is None and shape.activation == SILU else 0
    for name, row in (("hidden", shape.hidden), ("MLP", gate)):
        if row > WIDEST_ROW:
            return (
                f"liger, whose kernels take rows of at most {WIDEST_ROW:,} channels, and this model has {row:,} {name} "
                "channels on a rank; write auto"
            )
    return None
