"""RMSNorm for Megatron's layer spec, and the projection that Gemma puts one behind."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor
from torch.nn import functional

from opd_async.learner.model.again import made_by, recomputes


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last axis (Zhang and Sennrich, 2019), in float32, then scaled.

    Gemma stores its weights less 1 (`layernorm_zero_centered_gamma`), and scales in float32 as well.
    megatron-core's own `WrappedTorchNorm` refuses sequence parallelism and ignores `params_dtype`; this does neither.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.centred: bool = config.layernorm_zero_centered_gamma
        self.again = recomputes(config)
        self.norm = config.kernels.norm
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        # Megatron sums the gradient of such weights over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise `hidden` [..., hidden_size]; same shape and dtype."""
        normed: Tensor = self.norm(hidden, self.weight, self.eps, centred=self.centred)
        if self.again:
            made_by(normed, partial(self.norm, hidden.detach(), self.weight.detach(), self.eps, centred=self.centred))
        return normed


class NormedOutput(RowParallelLinear):
    """The output projection of attention or MLP, with Gemma's norm behind it."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.post_norm = RMSNorm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """As Megatron's: [tokens, 1, channels of this rank] -> [tokens, 1, hidden], and no bias."""
        output, bias = super().forward(input_)
        return self.post_norm(output), bias


def by_torch(hidden: Tensor, weight: Tensor, eps: float, *, centred: bool) -> Tensor:
    """The norm as torch does it best on the device of `hidden`."""
    return (in_one_kernel if hidden.is_cuda else in_parts)(hidden, weight, eps, centred=centred)


def in_parts(hidden: Tensor, weight: Tensor, eps: float, *, centred: bool) -> Tensor:
    """The norm as transformers has it: rounded to the dtype of `hidden` before it is scaled, but for Gemma."""
    normed = hidden.float()
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    if centred:
        return (normed * (1.0 + weight.float())).to(hidden.dtype)
    return weight * normed.to(hidden.dtype)


def in_one_kernel(hidden: Tensor, weight: Tensor, eps: float, *, centred: bool) -> Tensor:
    """The norm by torch, which has one kernel for it on CUDA: rounded to the dtype of `hidden` once, when it is scaled.

    The backward pass keeps `hidden` and one number for each norm. 1 + weight is not rounded, so Gemma's is in float32.
    """
    if centred:
        return functional.rms_norm(hidden.float(), weight.shape, 1.0 + weight.float(), eps).to(hidden.dtype)
    return functional.rms_norm(hidden, weight.shape, weight, eps)
