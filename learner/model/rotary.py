"""Rotary angles for packed positions (Su et al., 2021), with the scalings that Hugging Face configs name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_async.learner.model.architecture import RopeShape


def inverse_frequencies(rope: RopeShape, head_dim: int) -> Tensor:
    """float32[head_dim / 2]: radians per position of each channel pair.

    `linear` divides all by `factor`; `llama3` divides only wavelengths that are long against the original context and
    blends in between (the rule of Llama 3.1's reference code).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_positions * frequencies / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clamp(0.0, 1.0)
        return blend * frequencies + (1.0 - blend) * frequencies / rope.factor
    return frequencies


def angles(inverse_frequencies: Tensor, positions_P: Tensor) -> Tensor:
    """float32[P, 1, 1, head_dim]: the angle of each channel at each position, as Megatron's rotary helper expects."""
    half = positions_P.float()[:, None] * inverse_frequencies
    return torch.cat([half, half], dim=-1)[:, None, None, :]
