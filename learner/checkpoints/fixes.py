"""What megatron-core 0.16.1 needs so that a checkpoint of its distributed optimizer can be resumed exactly.

Most of it is needed because the library is written for Transformer Engine's or Apex's Adam and meets torch's AdamW. The
tests resume for several steps, because the step counter goes wrong silently and shows at the second step after a load.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from opd_async.learner.checkpoints import unpickle


def install() -> None:
    """Patch the library once; call it before the first save or load."""
    unpickle.install()
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()  # in place of a manager process, which takes seconds to start
        filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_in_this_process)
        DistributedOptimizer._set_main_param_and_optimizer_states = _set_states


def _write_in_this_process(transforms: Any, _use_msc: bool, _rank: int, buckets: Any, results: Any) -> None:
    """Write the buckets one after the other, without forking.

    The library forks one writer per bucket even for a save that its caller waits for; forking a process that holds
    communication threads is unsafe, and slower than the writing itself.
    """
    written: queue.Queue[tuple[int, Any]] = queue.Queue()
    unfinished: queue.Queue[int] = queue.Queue()
    outcome: Any = {}
    for index, bucket in enumerate(buckets):
        unfinished.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, index, bucket, written, unfinished, True
        )
        _, outcome[index] = written.get_nowait()
        if isinstance(outcome[index], Exception):
            outcome = outcome[index]
            break
    results.put(outcome)


_original_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def _set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
    """The reshardable format leaves out Adam's `step`, which the original then looks up: keep the current one."""
    group_index, index = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group_index]["params"][index]
    step = self.optimizer.state[main_param]["step"]
    return _original_set_states(self, model_param, {"step": step, **tensors})


def prime_states(optimizer: Any) -> None:
    """Give every parameter zero Adam states where it has none: the library asserts that states exist."""
    for inner, group, parameter in _parameters(optimizer):
        if not inner.state[parameter]:
            inner.state[parameter] = {
                "step": _count(0.0, group, parameter),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def optimizer_step(optimizer: Any) -> float:
    """How many steps Adam has taken: the same for every parameter."""
    return next(float(inner.state[parameter]["step"]) for inner, _group, parameter in _parameters(optimizer))


def at_step(distributed: Any, step: float) -> dict[str, Any]:
    """The optimizer's own state without that of its parameters, as if it had taken `step` steps."""
    state: dict[str, Any] = distributed.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["step"] = step
    return state


def separate_steps(optimizer: Any) -> None:
    """Give every parameter its own step counter after a load.

    The library puts one tensor into all states, which AdamW then counts up once per parameter.
    """
    for inner, group, parameter in _parameters(optimizer):
        inner.state[parameter]["step"] = _count(float(group["step"]), group, parameter)


def _count(steps: float, group: dict[str, Any], parameter: torch.Tensor) -> torch.Tensor:
    """A step counter where AdamW looks for it: beside the weights for the fused kernel, else on the host."""
    return torch.full((), steps, device=parameter.device if group.get("fused") else "cpu")


@contextmanager
def padded_buckets(optimizer: Any) -> Iterator[None]:
    """Inside the block, the library finds every parameter's state where it is.

    It packs the buckets without the padding between them and then reads at the padded offsets. A buffer has several
    buckets where a tied embedding is split from its LM head by pipeline stages: what is saved is then shifted, and
    filled up with zeros. With the padding counted in, packed and padded offsets are the same.
    """
    owners = [owner for inner in optimizer.chained_optimizers for b in inner.buffers for owner in (b, *b.buckets)]
    unpadded = [owner.numel_unpadded for owner in owners]
    for owner in owners:
        owner.numel_unpadded = owner.grad_data.numel()
    try:
        yield
    finally:
        for owner, count in zip(owners, unpadded, strict=True):
            owner.numel_unpadded = count


def _parameters(optimizer: Any) -> Iterator[tuple[Any, dict[str, Any], torch.Tensor]]:
    """(torch optimizer, parameter group, float32 shard) of every parameter on this rank."""
    for distributed in optimizer.chained_optimizers:
        for group in distributed.optimizer.param_groups:
            for parameter in group["params"]:
                yield distributed.optimizer, group, parameter
