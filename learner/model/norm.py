"""RMSNorm for Megatron's layer spec."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich, 2019), in float32, then scaled in the input dtype.

    Gemma stores its weights less 1 (`layernorm_zero_centered_gamma`), and scales in float32 as well.
    megatron-core's own `WrappedTorchNorm` refuses sequence parallelism and ignores `params_dtype`; this does neither.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.centred: bool = config.layernorm_zero_centered_gamma
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Megatron sums the gradient of such weights over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `hidden` [..., hidden_size]; same shape and dtype."""
        normed = hidden.float()
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + self.eps)
        if self.centred:
            return (normed * (1.0 + self.weight.float())).to(hidden.dtype)
        return self.weight * normed.to(hidden.dtype)
