"""Rotary angles for packed positions (Su et al., 2021), with the scalings that Hugging Face configs name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd_async.learner.model.architecture import RopeShape


def inverse_frequencies(rope: RopeShape, head_dim: int) -> Tensor:
    """float32[head_dim / 2]: radians per position of each channel pair.

    `linear` divides all by `factor`; `llama3` divides only wavelengths that are long against the original context and
    blends in between (the rule of Llama 3.1's reference code); `yarn` divides channels that turn slowly and blends over
    channels (Peng et al., 2023).
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
    if rope.kind == "yarn":
        kept = _kept_channels(rope, head_dim)
        return kept * frequencies + (1.0 - kept) * frequencies / rope.factor
    return frequencies


def _kept_channels(rope: RopeShape, head_dim: int) -> Tensor:
    """float32[head_dim / 2]: 1 where YaRN leaves a channel pair alone, 0 where it divides by the factor.

    The borders are the channels that turn `beta_fast` and `beta_slow` times over the original positions.
    """
    borders = [
        head_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    ]
    if rope.whole_channels:
        borders = [float(math.floor(borders[0])), float(math.ceil(borders[1]))]
    low, high = max(borders[0], 0.0), min(borders[1], head_dim - 1.0)
    if low == high:
        high += 0.001  # as transformers does: a step in place of a ramp
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    return 1.0 - ramp.clamp(0.0, 1.0)


def angles(inverse_frequencies: Tensor, positions_P: Tensor) -> Tensor:
    """float32[P, 1, 1, head_dim]: the angle of each channel at each position, as Megatron's rotary helper expects."""
    half = positions_P.float()[:, None] * inverse_frequencies
    return torch.cat([half, half], dim=-1)[:, None, None, :]
