"""A trainer's life on fake tensors: built, two steps, its weights, its checkpoint's state. See `cuda_rank`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.attention.varlen as varlen
from cuda_rank import Case, Found
from device_watch import DeviceWatch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher
from pretend_cuda import READS, SYNCS
from stand_in_kernels import installed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import opd_async.learner  # noqa: F401  # brings Megatron up on the pretended device
from opd_async.estimators.topk import TopK
from opd_async.learner import teacher as teacher_module
from opd_async.learner import trainer as trainer_module
from opd_async.learner.config import CriticConfig, LearnerConfig, LossConfig, ParallelConfig, TeacherConfig
from opd_async.learner.critic import critic as critic_module
from opd_async.learner.distributed import parallel
from opd_async.learner.hf import io as hf_io
from opd_async.learner.metrics import MAXIMA, SUMS, Totals
from opd_async.transport.step_batch import MicroBatch, StepBatch

megatron_any: Any = megatron_random
megatron_any._get_cuda_rng_state = lambda *_args, **_options: torch.zeros(16, dtype=torch.uint8)
megatron_any._set_cuda_rng_state = lambda *_args, **_options: None
newest_varlen = varlen.varlen_attn
sort_chunks = token_dispatcher.sort_chunks_by_idxs


def sort_chunks_as_they_come(tokens: Any, sizes: Any, order: Any, **options: Any) -> Any:
    """Megatron's sorting of tokens by expert, told an order that fake tensors have no values for."""
    return sort_chunks(tokens, sizes, Order(len(order)), **options)


@dataclass(frozen=True)
class Order:
    """The indices of chunks, as they come."""

    count: int

    def tolist(self) -> list[int]:
        return list(range(self.count))


any_dispatcher: Any = token_dispatcher
any_dispatcher.sort_chunks_by_idxs = sort_chunks_as_they_come


def no_flops(*_args: Any, **_options: Any) -> int:
    """Of what is bound by bytes, and is to be seen whole."""
    return 0


def addmm_flops(_self: Any, left: Any, right: Any, *_args: Any, **_options: Any) -> int:
    """torch's own does not know the form that says the dtype of its result."""
    return 2 * left[0] * left[1] * right[1]


COUNTED = {
    torch.ops.aten._fused_rms_norm: no_flops,
    torch.ops.aten._fused_rms_norm.default: no_flops,  # else the counter takes it apart before anybody sees it
    torch.ops.aten._fused_rms_norm_backward: no_flops,
    torch.ops.aten.addmm: addmm_flops,
    torch.ops.aten.addmm_: addmm_flops,
}


def micro_batch(case: Case, generator: np.random.Generator) -> MicroBatch:
    """`sequences` texts of `length` tokens, trained behind their first eighth."""
    ends = np.arange(case.sequences + 1, dtype=np.int32) * case.length
    first, last = case.length // 8, case.length - 1
    rows = np.concatenate([np.arange(start + first, start + last) for start in ends[:-1]]).astype(np.int32)
    zeros = np.zeros(len(rows), np.float32)
    topk = None
    if case.topk:
        ids = np.tile(np.arange(case.topk, dtype=np.int32), (len(rows), 1))
        topk = TopK(ids, np.full(ids.shape, -3.0, np.float32))
    return MicroBatch(
        token_ids=generator.integers(0, 30, case.sequences * case.length).astype(np.int32),
        cu_seqlens=ends,
        rows=rows,
        behaviour_logprobs=zeros,
        teacher_logprobs=zeros,
        advantages=zeros,
        staleness=np.zeros(len(rows), np.int32),
        topk=topk,
        rewards=zeros if case.critic else None,
    )


def learner_config(case: Case) -> LearnerConfig:
    """What the learner would be told."""
    inside = {
        name: TeacherConfig(model_path=Path(path), load=None, offload=case.offload)
        for name, path in (("teacher", case.teacher), ("reference", case.reference))
        if path is not None
    }
    return LearnerConfig(
        model_path=Path(case.model),
        dtype=case.dtype,  # type: ignore[arg-type]
        parallel=ParallelConfig(**case.parallel),
        loss=LossConfig(**case.loss),
        logprob_chunk_rows=case.chunk_rows,
        recompute=case.recompute,  # type: ignore[arg-type]
        kernels=case.kernels,  # type: ignore[arg-type]
        critic=CriticConfig(model_path=Path(case.critic)) if case.critic is not None else None,
        **inside,
    )


def old_varlen(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Any:  # fmt: skip
    """`varlen_attn` as torch 2.11 declares it."""
    gqa = query.shape[1] != key.shape[1]
    return newest_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=gqa
    )


@contextmanager
def world(case: Case, tokens: int, seen: set[str]) -> Iterator[None]:
    """Megatron's groups for the case, no weights to read, and sums over ranks that agree with the batch."""
    real = trainer_module.reduce_over_ranks

    def reduce_over_ranks(reports: Any, device: torch.device) -> Totals:
        for sums, maxima in reports:
            for name, value in (*sums.items(), *maxima.items()):
                seen.add(f"{name} {value.device.type} {str(value.dtype).removeprefix('torch.')}")
        real(reports, device)
        rows = dict.fromkeys(SUMS, float(tokens))
        return Totals(sums=dict.fromkeys(SUMS, 0.0), rows=rows, maxima=dict.fromkeys(MAXIMA, 0.0))

    modules: list[Any] = [trainer_module, teacher_module, critic_module]
    kept = [module.load_hf for module in modules]
    any_trainer: Any = trainer_module
    any_varlen: Any = varlen
    try:
        for module in modules:
            module.load_hf = lambda model, _folder: hf_io.mark_shards(model)
        any_trainer.reduce_over_ranks = reduce_over_ranks
        any_varlen.varlen_attn = old_varlen if case.old_varlen else newest_varlen
        parallel.start(ParallelConfig(**case.parallel), 0)
        yield
    finally:
        any_trainer.reduce_over_ranks = real
        any_varlen.varlen_attn = newest_varlen
        for module, load in zip(modules, kept, strict=True):
            module.load_hf = load
        parallel_state.destroy_model_parallel()


def run_case(case: Case) -> Found:
    """Build, take two steps, and do what else the case asks for."""
    found, seen, watch = Found(name=case.name), set[str](), DeviceWatch()
    generator = np.random.default_rng(0)
    batches = tuple(micro_batch(case, generator) for _ in range(case.micro_batches))
    config = learner_config(case)
    axes = config.parallel
    data = case.world // (axes.tensor * axes.pipeline * axes.context)
    tokens = sum(len(batch.rows) for batch in batches) * data
    with ExitStack() as stack:
        stack.enter_context(world(case, tokens, seen))
        stack.enter_context(installed(*case.packages))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watch)
        trainer = trainer_module.Trainer(config)
        found.built_bytes, found.kernels = watch.live, trainer.model.config.kernels.said
        expect_reads(case, axes, trainer.shape)
        trainer.step(StepBatch(version=0, loss_tokens=tokens, micro_batches=batches))
        SYNCS.clear()
        watch.restart()
        flops = FlopCounterMode(display=False, custom_mapping=COUNTED)
        with flops:
            trainer.step(StepBatch(version=1, loss_tokens=tokens, micro_batches=batches))
        found.live_bytes, found.peak_bytes, found.peak_at = watch.live, watch.peak, watch.peak_at
        found.operations, found.operation_bytes = watch.operations.total(), watch.bytes.total()
        found.bytes_by = dict(watch.bytes)
        found.flops, found.syncs = flops.get_total_flops(), dict(SYNCS)
        by_operation = flops.get_flop_counts()["Global"]
        found.attention_flops = sum(count for operation, count in by_operation.items() if "attn" in str(operation))
        found.wrong, found.devices = list(watch.wrong), sorted(seen)
        if case.weights:
            found.tensors = gathered(trainer, found)
        if case.state:
            found.state = checkpoint_state(trainer)
    return found


def expect_reads(case: Case, axes: ParallelConfig, shape: Any) -> None:
    """The numbers that decide shapes: tokens of a pipeline stage; tokens of experts, which all get as many."""
    tokens = case.sequences * case.length // axes.tensor // axes.context
    READS.clear()
    READS["cuda", (3,)] = [tokens, 1, shape.hidden]
    if (experts := shape.experts) is not None:
        routed = tokens * experts.per_token
        READS["selected", ()] = [routed]
        READS["cpu", (experts.count,)] = [routed // experts.count] * experts.count
        for parts in {axes.expert, experts.count // axes.expert}:
            READS["cpu", (parts,)] = [routed // parts] * parts


def gathered(trainer: Any, found: Found) -> int:
    """Gather the weights for the engines, in buckets; how many tensors they are."""
    from opd_async.learner.weights.buckets import buckets

    count, room = 0, torch.empty(0, dtype=torch.uint8)
    for bucket in buckets(hf_io.hf_weights(trainer.model, torch.bfloat16), 1 << 20):
        assert {tensor.dtype for tensor in bucket.tensors} == {torch.bfloat16}
        payload = bucket.flatten(room)
        assert payload.device.type == "cuda", f"a payload of {bucket.names} on {payload.device}"
        count += len(bucket.names)
    return count


def checkpoint_state(trainer: Any) -> int:
    """Make the state that a checkpoint saves; how many tensors it has."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from opd_async.learner import resume

    state = resume._sharded(resume._learning(trainer)[0], loading=False)
    return sum(isinstance(value, ShardedTensor) for value in nested_values(state))
