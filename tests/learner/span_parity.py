"""Episodes with given spans for gradients in every layout: what is trained, by whom it is taught, and the gradient that
transformers and plain autograd have for it; shared with the multi-rank worker script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from full_fixtures import enumerated
from megatron.core import parallel_state
from numpy.typing import NDArray
from tiny_learner import EMPTY, VOCAB, random_topk, step_batch
from torch import Tensor
from transformers import AutoModelForCausalLM

from opd_async.learner.config import LearnerConfig, LossConfig, TeacherConfig
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.hf.io import hf_weights
from opd_async.learner.losses.divergences import DIVERGENCES, Cells
from opd_async.learner.trainer import Trainer
from opd_async.scheduling.packing import micro_batch
from opd_async.scheduling.segments import Segment
from opd_async.transport.step_batch import StepBatch

PROMPT = 4
SPANS = {3: [(5, True), (7, False), (6, True), (2, False), (4, True)], 4: [(3, False), (9, True), (3, False)]}
"""By sample, its spans: (tokens, sampled). The last one of sample 4 is nothing but a label of what was sampled."""
CUT_AT = (8, 20)
"""Positions of sample 3 at which steps have cut it: within given tokens, and behind some."""
LOSSES = ("reverse_kl", "jsd_topk", "jsd_full")
BETA = 0.3


def segments(whole: bool, *, labels_moved: bool = False) -> list[Segment]:
    """The episodes as steps take them, cut or `whole`. `labels_moved`: other tokens behind the last sampled one."""
    found = []
    for sample_id, spans in SPANS.items():
        draw, count = np.random.default_rng(sample_id), sum(tokens for tokens, _ in spans)
        ids = draw.integers(0, VOCAB, PROMPT + count).astype(np.int32)
        sampled = np.repeat([by for _, by in spans], [tokens for tokens, _ in spans])
        teacher = draw.uniform(-4.0, -1.0, count).astype(np.float32)
        behaviour = draw.uniform(-3.6, -3.4, count).astype(np.float32)
        if labels_moved:
            last = PROMPT + int(np.flatnonzero(sampled)[-1])
            ids[last + 1 :] = (ids[last + 1 :] + 1) % VOCAB
        cuts = () if whole or sample_id != 3 else CUT_AT
        for start, end in pairwise((0, *cuts, count)):
            positions = (np.flatnonzero(sampled[start:end]) + start).astype(np.int32)
            segment = Segment(
                sample_id=sample_id,
                prompt_tokens=PROMPT,
                start=start,
                end=end,
                complete=end == count,
                token_ids=ids[: PROMPT + end],
                behaviour_logprobs=behaviour[positions],
                teacher_logprobs=teacher[positions],
                versions=np.zeros(len(positions), np.int32),
                positions=positions,
            )
            topk = random_topk(count, 4, sample_id)
            segment.topk = type(topk)(topk.ids[positions], topk.logprobs[positions])
            found.append(segment)
    return found


def config_of(config: LearnerConfig, loss: str, teacher: Path) -> LearnerConfig:
    """A learner with one of `LOSSES`, whose teacher is inside where it needs one."""
    inside = TeacherConfig(model_path=teacher, load=None) if loss == "jsd_full" else None
    # no bound, on a ratio or a signal: every row has the gradient of its formula
    chosen = LossConfig(loss=loss, jsd_beta=BETA, clip_ratio=100.0, signal_clamp=100.0)
    return replace(config, loss=chosen, teacher=inside)


def batch_of(taken: Sequence[Segment], loss: str, place: Place) -> StepBatch:
    """A micro-batch for each segment, dealt to data-parallel ranks as a step is."""
    packs = [micro_batch([segment], 0) for segment in taken]
    packs = [pack if loss == "jsd_topk" else replace(pack, topk=None) for pack in packs]
    if loss == "jsd_full":
        packs = [replace(pack, teacher_logprobs=np.zeros(0, np.float32)) for pack in packs]
    own = packs[place.data_rank :: place.data_size]
    own += [EMPTY] * (-(-len(packs) // place.data_size) - len(own))
    return step_batch(0, own, sum(segment.tokens for segment in taken))


def gathered_gradient(trainer: Trainer, batch: StepBatch) -> dict[str, Tensor]:
    """The gradient of a step that several ranks hold, under Hugging Face names, on rank 0; every rank calls it.

    Each data-parallel rank has summed its own shard of the buffers; tensor-parallel ranks have rows or columns.
    """
    trainer.gradients(batch)
    for buffer in trainer.ddp.buffers:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)
    parameters = list(trainer.model.parameters())
    weights = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.main_grad.clone()  # type: ignore[attr-defined]
        return {name: tensor.clone() for name, tensor in hf_weights(trainer.model)}
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight


def gradients(config: LearnerConfig, teacher: Path, place: Place) -> dict[str, dict[str, Tensor]]:
    """By loss and form ("cut", "whole", "labels" with other tokens behind the last sampled ones): the gradient."""
    found = {}
    for loss in LOSSES:
        trainer = Trainer(config_of(config, loss, teacher))
        for form in ("cut", "whole", "labels"):
            taken = segments(form == "whole", labels_moved=form == "labels")
            found[f"{loss}/{form}"] = gathered_gradient(trainer, batch_of(taken, loss, place))
    return found


def _table(model: torch.nn.Module, ids: NDArray[np.int32], positions: NDArray[np.int32]) -> Tensor:
    """float32[n, V]: logits for the tokens at these positions of the response."""
    table: Tensor = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    return table[PROMPT + positions - 1]


def _loss(loss: str, segment: Segment, student: torch.nn.Module, teacher: torch.nn.Module) -> Tensor:
    """The sum over one response's sampled tokens, from its definition."""
    assert segment.positions is not None and segment.topk is not None
    logits = _table(student, segment.token_ids, segment.positions)
    if loss == "jsd_full":
        with torch.no_grad():
            wanted = _table(teacher, segment.token_ids, segment.positions).double()
        return torch.stack([enumerated(loss, p, q, BETA) for p, q in zip(logits.double(), wanted, strict=True)]).sum()
    table = logits.log_softmax(-1)
    if loss == "jsd_topk":
        ids = torch.from_numpy(segment.topk.ids.astype(np.int64))
        tail = table.scatter(1, ids, -torch.inf).logsumexp(-1)
        cells = Cells(table.gather(1, ids), tail, torch.from_numpy(segment.topk.logprobs))
        return DIVERGENCES[loss](cells, LossConfig(loss=loss, jsd_beta=BETA)).sum()
    sampled = torch.from_numpy(segment.token_ids[PROMPT + segment.positions].astype(np.int64))
    own = table.gather(1, sampled[:, None])[:, 0]
    ratio = (own - torch.from_numpy(segment.behaviour_logprobs)).exp()
    return -(ratio * (torch.from_numpy(segment.teacher_logprobs) - own.detach())).sum()


def expected(model: Path, teacher: Path) -> dict[str, dict[str, Tensor]]:
    """By loss: the gradient by transformers, of whole responses, one sequence at a time."""
    found = {}
    taught = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    for loss in LOSSES:
        student, taken = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), segments(True)
        total = torch.stack([_loss(loss, segment, student, taught).double() for segment in taken]).sum()
        (total / sum(segment.tokens for segment in taken)).backward()
        found[loss] = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return found
