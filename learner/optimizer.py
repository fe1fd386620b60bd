"""Megatron's DDP and distributed optimizer around the model, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from torch import Tensor

from opd_async.learner.config import OptimConfig
from opd_async.learner.distributed.cpu import on_this_device, quiet, this_device
from opd_async.learner.model.decoder import DecoderModel

CLIP_EPS = 1e-6
"""As in torch's and Megatron's clipping: what a norm of zero is divided by."""


def learning_rate(step: int, config: OptimConfig) -> float:
    """The learning rate of optimizer step `step` (0-based).

    Linear warm-up over `warmup_steps` steps (the first step already moves), then decay to `min_lr_ratio * lr` at
    step `total_steps`, constant from there on.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, config.total_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    share = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[config.decay]
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * share)


def wrap(model: DecoderModel) -> Any:
    """The model in Megatron's DDP: contiguous buffers, float32 gradients, reduce-scatter to the optimizer's shards.

    Call it once the weights are loaded: it moves them into its own buffers.
    """
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    with on_this_device():
        return DistributedDataParallel(model.config, ddp_config, model)


def finalize(model: list[Any], _num_tokens: Tensor | None, **options: Any) -> None:
    """Sum gradients over ranks. Megatron's default would divide by a token count, which the loss has done already."""
    finalize_model_grads(model, None, **options)


def make_optimizer(ddp: Any, config: OptimConfig, *, bf16: bool) -> Any:
    """AdamW over data-parallel shards; with `bf16` weights it keeps float32 master weights.

    Matrices and embeddings decay; norms and biases, which have one dimension, do not. On CUDA it is one kernel for all
    parameters, without the temporary of their size that torch's default makes.
    """
    _choose_torch()
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        bf16=bf16,
        params_dtype=ddp.config.params_dtype,
        use_distributed_optimizer=True,
    )
    with quiet(), on_this_device():
        optimizer = get_megatron_optimizer(optimizer_config, [ddp])
    for group in optimizer.param_groups:
        # the library leaves this to its own scheduler of learning rates, which is not used here
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
        if this_device().type == "cuda":
            group["fused"], group["foreach"] = True, False
    return optimizer


def _choose_torch() -> None:
    """Have Megatron take torch's AdamW also where Transformer Engine or Apex is installed.

    Their fused Adams keep their states otherwise: one way to write a checkpoint, whatever the machine has.
    """
    library: Any = megatron_optimizer
    shards: Any = distrib_optimizer
    library.USING_PYTORCH_OPTIMIZER = True
    shards.HAVE_APEX_OR_TE = shards.USING_TE_OPTIMIZER = shards.USING_APEX_OPTIMIZER = False


def apply_gradient(optimizer: Any, rate: float, clip: float) -> float:
    """Clip the gradient to the global L2 norm `clip` and step with learning rate `rate`; returns the norm before.

    Megatron's own `optimizer.step()` in three parts, so that a gradient that is not finite is caught in between: then
    no weight changes, and the caller, who knows whose it is, refuses the norm.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    with on_this_device():
        optimizer.prepare_grads()
        norm = gradient_norm(optimizer)
        if not math.isfinite(norm):
            return norm
        if (share := clip / (norm + CLIP_EPS)) < 1.0:
            gradients = [weights.grad for part in optimizer.chained_optimizers for weights in part.get_parameters()]
            torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], share)
        optimizer.step_with_ready_grads()
    return norm


def gradient_norm(optimizer: Any) -> float:
    """The L2 norm of the gradient over all ranks, each shard counted once.

    All ranks call it. The host waits once: Megatron's own, where neither Transformer Engine nor Apex is, waits for the
    norm of every parameter.
    """
    total = torch.zeros((), device=this_device())
    for part in optimizer.chained_optimizers:  # experts that are spread over ranks have one of their own
        square = torch.zeros_like(total)
        if gradients := part.get_main_grads_for_grad_norm():
            square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
        total += square
    return float(total.sqrt())
