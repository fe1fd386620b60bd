"""What the teacher in the learner's ranks thinks of whole texts, as an evaluation asks for it.

    texts -> dealt to the data-parallel ranks like a step -> the teacher's forward pass -> rows, gathered on every rank

Nothing of the student is looked at, and nothing of a step under way: only weights that stay as they are may be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from opd_async.estimators.topk import TopK
from opd_async.learner.errors import LearnerError
from opd_async.learner.teacher import Teacher
from opd_async.learner.trainer import Trainer
from opd_async.scheduling.packing import pack
from opd_async.scheduling.segments import Segment
from opd_async.transport.messages import AskTeacher
from opd_async.transport.step_batch import MicroBatch


class Opinion(NamedTuple):
    """Of the n response tokens of all texts, back to back."""

    logprobs: NDArray[np.float32]
    """float32[n], nats: the teacher's of these tokens."""
    topk: TopK | None
    """Its likeliest tokens in each place; None where none were asked for."""


def opinion(trainer: Trainer, asked: AskTeacher, micro_batch_tokens: int) -> Opinion:
    """Ask the teacher of `trainer`; all ranks call it with the same texts, and get the same answer.

    About `micro_batch_tokens` are forwarded at a time. Raises `LearnerError` where there is no teacher whose weights
    stay as they are.
    """
    teacher, config = trainer.teacher, trainer.config.teacher
    if not isinstance(teacher, Teacher) or config is None or config.weights != "frozen":
        raise LearnerError("a teacher was asked about texts, but the learner has none whose weights stay as they are")
    texts = _texts(asked)
    ends = np.cumsum([text.end for text in texts])
    batches, k = _share(texts, micro_batch_tokens), min(asked.topk, teacher.shape.vocab)
    found = teacher.tops(trainer.lay_out(batches), k)
    logprobs_R = torch.zeros(int(ends[-1]), dtype=torch.float32, device=trainer.device)
    likeliest_RK = logprobs_R.new_zeros(len(logprobs_R), k)
    ids_RK = torch.zeros(likeliest_RK.shape, dtype=torch.int64, device=trainer.device)
    for batch, tops in zip(batches, found, strict=True) if _speaks() else ():
        for rows, place in _places(batch, ends):
            logprobs_R[place], likeliest_RK[place] = tops.sampled_R[rows], tops.logprobs_RK[rows]
            ids_RK[place] = tops.ids_RK[rows]
    for values in (logprobs_R, likeliest_RK, ids_RK):
        if values.numel():  # every row comes from one rank, the others hold zero
            dist.all_reduce(values)
    topk = TopK(_array(ids_RK).astype(np.int32), _array(likeliest_RK)) if k else None
    return Opinion(_array(logprobs_R), topk)


def _texts(asked: AskTeacher) -> list[Segment]:
    """Each text as a response of which every token is a row, numbered in order."""
    ids_of = np.split(asked.token_ids, np.cumsum(asked.sequence_lengths)[:-1])
    return [
        Segment(
            sample_id=number,
            prompt_tokens=prompt,
            start=0,
            end=len(ids) - prompt,
            complete=True,
            token_ids=ids,
            behaviour_logprobs=np.zeros(len(ids) - prompt, np.float32),
            teacher_logprobs=np.zeros(0, np.float32),
            versions=np.zeros(len(ids) - prompt, np.int32),
        )
        for number, (ids, prompt) in enumerate(zip(ids_of, asked.prompt_lengths.tolist(), strict=True))
    ]


def _share(texts: Sequence[Segment], micro_batch_tokens: int) -> Sequence[MicroBatch]:
    """The micro-batches of this rank: as many as every other one has."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    return pack(texts, 0, ranks, micro_batch_tokens)[rank].micro_batches


def _speaks() -> bool:
    """Whether this rank is the one of its data-parallel rank that adds its rows to the sum over all ranks."""
    first = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0
    return first and parallel_state.is_pipeline_last_stage()


def _places(batch: MicroBatch, ends: NDArray[np.int64]) -> list[tuple[slice, slice]]:
    """For each text in a micro-batch, its rows there and among those of all texts, which end at `ends`."""
    places, done = [], 0
    for number in batch.sample_ids.tolist() if batch.sample_ids is not None else ():
        start, end = int(ends[number - 1]) if number else 0, int(ends[number])
        places.append((slice(done, done + end - start), slice(start, end)))
        done += end - start
    return places


def _array(values: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = values.cpu().numpy()
    return found
