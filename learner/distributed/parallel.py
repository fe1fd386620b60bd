"""Start torch.distributed and Megatron's process groups from torchrun's environment."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from opd_async.learner.config import ParallelConfig
from opd_async.learner.distributed.cpu import on_this_device
from opd_async.learner.errors import LearnerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where this process stands: its global rank and its coordinates on the parallel axes."""

    rank: int
    world_size: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    data_size: int


def start(config: ParallelConfig, seed: int) -> Place:
    """Join the other ranks. Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; alone without them.

    Raises `LearnerError` if the world size is not a multiple of tensor x context x pipeline, or if a stage's
    ranks do not divide by the expert-parallel size.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model_ranks = config.tensor * config.context * config.pipeline
    if world_size % model_ranks:
        raise LearnerError(
            f"{world_size} learner ranks cannot hold tensor_parallel {config.tensor} x context_parallel "
            f"{config.context} x pipeline_parallel {config.pipeline}; start a multiple of {model_ranks} ranks"
        )
    sharing = world_size // config.pipeline
    if sharing % config.expert:
        raise LearnerError(
            f"expert_parallel {config.expert} does not divide the {sharing} ranks of a pipeline stage, which share the "
            f"experts out; start more ranks, or write a divisor of {sharing}"
        )
    # One hardware queue keeps communication kernels from overtaking; Megatron asks for it with tensor parallelism.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _join(rank, world_size, timedelta(seconds=config.timeout_s))
    parallel_state.initialize_model_parallel(
        config.tensor,
        config.pipeline,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        distributed_timeout_minutes=max(1, round(config.timeout_s / 60)),
        create_gloo_process_groups=True,
    )
    _seed(seed)
    return Place(
        rank=rank,
        world_size=world_size,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def _join(rank: int, world_size: int, timeout: timedelta) -> None:
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_initialized():  # only the parallel sizes change
        return
    if world_size == 1:  # no port is needed to be alone
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)


def _seed(seed: int) -> None:
    """Same seed everywhere but for Megatron's tracker, which offsets it by tensor- and pipeline-parallel rank."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with on_this_device():
        model_parallel_cuda_manual_seed(seed)


def stop() -> None:
    """Leave all groups. Safe to call when nothing was started."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
