"""Whose kernels compute a decoder's attention, norms and gates: `learner.kernels`, decided once for each model.

    key     attention in bfloat16                          norms   gates of dense layers   needs
    auto    FlashAttention 3, else torch's varlen_attn     torch   torch                   nothing
    torch   torch's varlen_attn                            torch   torch                   nothing
    liger   as auto                                        Liger   Liger, torch for GELU   liger-kernel, CUDA
    te      Transformer Engine's choice                    torch   torch                   transformer-engine, CUDA

FlashAttention 3 is taken where it is installed, on a Hopper GPU, and does the model's attention when it is tried. All
else (products, rotary angles, experts, losses) is computed alike with every key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from opd_async.data.decoder import SILU
from opd_async.data.kernel_limits import PACKAGES, PARTS, kernel_problem
from opd_async.learner.config import LearnerConfig
from opd_async.learner.errors import ModelError
from opd_async.learner.model import gated, liger, norm, packs
from opd_async.learner.model.architecture import ModelShape
from opd_async.learner.model.attention import has_varlen

FLASH3 = "flash_attn_interface"
"""The module of FlashAttention 3; FlashAttention 2 calls its own otherwise."""
HOPPER = (9, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Functions that a model's layers call."""

    attention: packs.PackKernel = packs.by_torch
    """For packs that one kernel serves (`attention.has_varlen`)."""
    norm: Callable[..., Tensor] = norm.by_torch
    """(hidden, weight, eps, centred=) -> normed, with gradients."""
    gate: Callable[[Tensor, gated.Activation], Tensor] = gated.by_torch
    """With gradients; keeps nothing but its input."""
    said: str = "attention, norms and gates by torch"
    """For the log."""


def choose(config: LearnerConfig, shape: ModelShape) -> Kernels:
    """The kernels of a model on this rank's device.

    Raises `ModelError` if what `learner.kernels` asks for cannot be had: no CUDA, no package, another dtype or a model
    that it does not do.
    """
    asked = config.kernels
    if asked in PARTS:
        _refuse(config, shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention, said = _attention(config, shape, device)
    if asked != "liger":
        return Kernels(attention=attention, said=f"{said}, norms and gates by torch")
    gates = "Megatron (experts)" if shape.experts is not None else "Liger" if shape.activation == SILU else "torch"
    return Kernels(
        attention=attention, norm=liger.norm, gate=liger.gate, said=f"{said}, norms by Liger, gates by {gates}"
    )


def _refuse(config: LearnerConfig, shape: ModelShape) -> None:
    """Raise if what is asked for by name cannot be had."""
    asked = config.kernels
    if not torch.cuda.is_available():
        raise ModelError(f"learner.kernels: {asked}, whose kernels run on CUDA only, and there is none; write auto")
    if asked == "te" and config.dtype != "bfloat16":
        raise ModelError(f"learner.kernels: te, whose attention takes no {config.dtype}; write learner.dtype: bfloat16")
    if asked == "te" and config.parallel.context > 1:
        raise ModelError("learner.kernels: te, but learner.context_parallel has an attention of its own; write auto")
    if limit := kernel_problem(asked, shape, config.parallel.tensor):
        raise ModelError(f"learner.kernels: {limit}")
    try:
        for module, name in PARTS[asked].items():
            getattr(import_module(module), name)
    except Exception as error:  # the edge of another's package: it raises what it likes when it is imported
        raise ModelError(
            f"learner.kernels: {asked}, which cannot be imported ({error}); install {PACKAGES[asked]}, or write auto"
        ) from error


def _attention(config: LearnerConfig, shape: ModelShape, device: torch.device) -> tuple[packs.PackKernel, str]:
    """The kernel for packs, and who computes attention and why, for the log."""
    if not has_varlen(device, getattr(torch, config.dtype)):
        return packs.by_torch, "attention by torch"
    if config.kernels == "te":
        if problem := _tried(packs.by_transformer_engine, shape, config.parallel.tensor):
            raise ModelError(f"learner.kernels: te, whose attention cannot do this model here ({problem}); write auto")
        return packs.by_transformer_engine, "attention by Transformer Engine"
    reason = _no_flash3(shape, config)
    if reason is None:
        return packs.by_flash3, "attention by FlashAttention 3"
    return packs.by_torch, f"attention by torch's FlashAttention 2 ({reason})"


def _no_flash3(shape: ModelShape, config: LearnerConfig) -> str | None:
    """Why FlashAttention 3 is not taken; None where it is."""
    if config.kernels == "torch":
        return "learner.kernels: torch"
    if torch.cuda.get_device_capability() != HOPPER:
        return "FlashAttention 3 is for Hopper GPUs"
    if find_spec(FLASH3) is None:
        return "FlashAttention 3 is not installed"
    problem = _tried(packs.by_flash3, shape, config.parallel.tensor)
    return None if problem is None else f"FlashAttention 3 cannot do this model: {problem}"


def _tried(kernel: Any, shape: ModelShape, tensor: int) -> str | None:
    """Why a `PackKernel` cannot do the attention of some layer; every window of the model is tried."""
    windows: set[Any] = ({None} if len(shape.windowed) < shape.layers else set()) | (
        {shape.window} if shape.windowed else set()
    )
    for window in windows:
        if problem := packs.problem(kernel, shape.heads // tensor, shape.kv_heads // tensor, shape.head_dim, window):
            return problem
    return None
