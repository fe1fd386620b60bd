"""The LM head of a model as losses use it: which of its rows take part, and those of a teacher beside the student's.

    student, tables of 10 and 13 rows, two ranks     0 1 2 3 4 | 5 6 7 8 9
    teacher's head as it is split                    0 1 2 3 4 5 6 | 7 8 9 10 11 12
    the same beside the student's                    0 1 2 3 4 | 5 6 7 8 9         and beyond: nothing | 10 11 12

Losses on the whole vocabulary compare the two models id by id, so a rank needs the same ids of both. Where the tables
differ and are split, the teacher's rows are copied to where the student's are, once, before the first step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from opd_async.learner.config import LearnerConfig
from opd_async.learner.losses.logprobs import Head
from opd_async.learner.model.architecture import ModelShape
from opd_async.learner.model.decoder import DecoderModel, padded_vocab

ALIGNED = "aligned_head"
"""Name of the parameter that holds the copied rows. It is in no checkpoint, and goes where the model's weights go."""


def rows_of_a_rank(shape: ModelShape, config: LearnerConfig) -> int:
    """How many rows of the LM head a tensor-parallel rank holds, padding included."""
    return padded_vocab(shape, config.parallel.tensor) // config.parallel.tensor


def head_of(model: DecoderModel, config: LearnerConfig, vocab: int | None = None) -> Head:
    """The LM head of a model on the last pipeline stage, over ids below `vocab` (None: all rows of its table)."""
    return Head(
        weight=model.head_weight(),
        vocab=model.shape.vocab if vocab is None else vocab,
        group=parallel_state.get_tensor_model_parallel_group(),
        chunk_rows=config.logprob_chunk_rows,
    )


def aligned_head(model: DecoderModel, config: LearnerConfig, vocab: int) -> Head:
    """The head of a teacher over the ids below `vocab`, split like the student's, and its rows beyond them.

    On the last pipeline stage, after `align_head`.
    """
    weight, group = model.head_weight(), parallel_state.get_tensor_model_parallel_group()
    first, rows = group.rank() * weight.shape[0], weight.shape[0]
    start, end = (min(max(bound - first, 0), rows) for bound in (vocab, model.shape.vocab))
    return Head(
        weight=getattr(model, ALIGNED, weight),
        vocab=vocab,
        group=group,
        chunk_rows=config.logprob_chunk_rows,
        beyond=weight[start:end] if model.shape.vocab > vocab else None,
    )


@torch.no_grad()
def align_head(model: DecoderModel, vocab: int, rows: int) -> None:
    """Give a teacher on the last pipeline stage the rows of the ids that the student's rank holds, `rows` on each.

    Nothing is copied where each rank has the right ones already. The ranks of a tensor-parallel group call it together.
    """
    weight, group = model.head_weight(), parallel_state.get_tensor_model_parallel_group()
    held = weight.shape[0]
    if group.size() == 1 or held == rows:
        return
    aligned = weight.new_zeros(rows, weight.shape[1])
    first = group.rank() * rows
    for source in range(group.size()):
        part: Tensor = weight.detach().clone() if source == group.rank() else torch.empty_like(weight)
        dist.broadcast(part, src=dist.get_global_rank(group, source), group=group)
        low, high = max(first, source * held), min(first + rows, (source + 1) * held, vocab)
        if low < high:
            aligned[low - first : high - first] = part[low - source * held : high - source * held]
    model.register_parameter(ALIGNED, torch.nn.Parameter(aligned, requires_grad=False))
