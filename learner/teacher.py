"""A teacher in the learner's ranks: split like the student, forwarded on the learner's micro-batches, without gradient.

    Megatron checkpoint -> decoder on all ranks (no DDP, no optimizer)
    micro-batches of a step -> forward through the pipeline stages -> what the loss needs of each row, last stage only

The student itself may be the teacher (`opd.type: self`): as it began, as it is (`LiveTeacher`), or as an average over
the steps (`learner.average`). A reference model is one too: the same forward pass, and `learner.objective` makes
another signal of it. A teacher may differ from the student in depth, width and the rows of its table of tokens. In a
step, the teacher runs over all micro-batches before the student does: weights that are in host memory between steps
(`offload`) travel to the device once per step and leave it before the student's activations come. Its weights are in no
checkpoint (but for an average), no export and no weight update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opd_async.config.losses import FULL_LOSSES
from opd_async.learner.checkpoints.model import load_model
from opd_async.learner.config import LearnerConfig, TeacherConfig
from opd_async.learner.distributed.cpu import on_this_device, this_device
from opd_async.learner.errors import CheckpointError, ModelError
from opd_async.learner.hf.io import load_hf
from opd_async.learner.losses.heads import align_head, aligned_head, head_of, rows_of_a_rank
from opd_async.learner.losses.logprobs import Head, row_logprobs
from opd_async.learner.losses.tops import RowTops, row_tops
from opd_async.learner.model.architecture import read_shape
from opd_async.learner.model.context import all_rows, everywhere
from opd_async.learner.model.decoder import DecoderModel, build_model
from opd_async.learner.model.layout import PackedBatch
from opd_async.learner.model.pipeline import run_schedule


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """What the teacher says about the R rows of a micro-batch: one number each, or the whole distribution."""

    logprobs_R: Tensor | None = None
    """float32[R], nats: of the sampled tokens; None where the loss is on the whole vocabulary."""
    hidden_OY: Tensor | None = None
    """[O, Y]: hidden states of the rows that this rank holds (all, without context parallelism), normed and ready for
    the head; None where the sampled tokens are enough."""
    head: Head | None = None
    """The teacher's LM head, whose weights are shared by all micro-batches."""
    own_O: Tensor | None = None
    """int64[O]: which of the R rows `hidden_OY` are; None where they are all. A teacher that reads other prompts has
    other positions, so that a rank of a context group holds other rows of it than of the student."""

    def hidden_of(self, packed: PackedBatch) -> Tensor:
        """The hidden states of the rows that `packed`, the student's layout, has on this rank: [O, Y]. All ranks of a
        context group call it."""
        assert self.hidden_OY is not None
        if self.own_O is None or packed.own_O is self.own_O:
            return self.hidden_OY
        return packed.own(all_rows(self.hidden_OY, self.own_O, len(packed.targets_R)))


class Teacher:
    """The teacher's part on this rank."""

    def __init__(self, config: LearnerConfig, teacher: TeacherConfig, vocab: int, *, within: bool = False) -> None:
        """Load the weights; all ranks call it, after `learner.parallel.start`.

        Ids below `vocab` are sampled. The distribution is that over all rows of the model's table, or, `within`, that
        over these ids alone. Raises `ModelError` if the teacher cannot be split like the student or has no row for one
        of them, `CheckpointError` if its checkpoint is not one of `model_path`'s shape.
        """
        self.shape = read_shape(teacher.model_path)
        if self.shape.vocab < vocab:
            raise ModelError(
                f"the teacher in {teacher.model_path} has a vocabulary of {self.shape.vocab}, but ids up to "
                f"{vocab - 1} are sampled; choose a teacher with a row for each"
            )
        self._config, self._vocab, self._within = config, vocab, within
        self._device = this_device()
        try:
            with on_this_device():
                self.model: DecoderModel = build_model(self.shape, config).to(self._device)
        except ModelError as error:
            raise ModelError(f"the teacher {teacher.model_path} cannot be split like the student: {error}") from error
        try:
            if teacher.load is None:
                load_hf(self.model, teacher.model_path)
            else:
                load_model(self.model, teacher.load)
        except CheckpointError as error:
            raise CheckpointError(
                f"the teacher: {error}; its shape is read from {teacher.model_path}: models.teacher.path, or the "
                "student's where there is none"
            ) from error
        self.model.requires_grad_(False)
        if config.loss.loss in FULL_LOSSES and self.model.post_process:
            align_head(self.model, vocab, rows_of_a_rank(read_shape(config.model_path), config))
        self._host = HostWeights(self.model, self._device) if teacher.offload else None

    def rows(self, packs: Sequence[PackedBatch], loss: str) -> list[TeacherRows]:
        """What `loss` needs of each micro-batch's rows; empty but on the last pipeline stage. All ranks call it."""
        with self._on_device():
            return rows_of(self.model, self._config, packs, loss, self._vocab, within=self._within)

    def tops(self, packs: Sequence[PackedBatch], k: int) -> list[RowTops]:
        """The k likeliest tokens of each micro-batch's rows, and the logprobs of the tokens that stand there; empty but
        on the last pipeline stage. Over all rows of the teacher's table, or, `within`, those that are sampled. All
        ranks call it."""

        def last_stage(index: int, hidden: Tensor) -> tuple[Tensor, RowTops]:
            packed = packs[index]
            head = head_of(self.model, self._config, self._vocab if self._within else None)
            found = row_tops(hidden[packed.rows_O, 0], head, packed.own(packed.targets_R), k)
            return hidden.new_zeros(()), everywhere(found, packed.own_O, len(packed.targets_R))

        with self._on_device(), on_this_device(), torch.no_grad():
            return run_schedule(self.model, packs, last_stage, train=False)

    def _on_device(self) -> AbstractContextManager[None]:
        return self._host.on_device() if self._host else nullcontext()

    def follow(self, student: DecoderModel) -> None:
        """The student has taken a step, which changes nothing here."""


class LiveTeacher:
    """The student of the step as its own teacher: its own weights, forwarded without gradient before they change."""

    def __init__(self, config: LearnerConfig, student: DecoderModel) -> None:
        self._config, self._student = config, student

    def rows(self, packs: Sequence[PackedBatch], loss: str) -> list[TeacherRows]:
        """As `Teacher.rows`."""
        return rows_of(self._student, self._config, packs, loss)

    def follow(self, student: DecoderModel) -> None:
        """The student has taken a step, and with it this teacher."""


def rows_of(
    model: DecoderModel,
    config: LearnerConfig,
    packs: Sequence[PackedBatch],
    loss: str,
    vocab: int | None = None,
    *,
    within: bool = False,
) -> list[TeacherRows]:
    """What `loss` needs of a model that teaches, by micro-batch; empty but on the last pipeline stage. All ranks call
    it.

    Ids below `vocab` (None: all) are sampled; `within`: the distribution is that over these alone.
    """

    def report(packed: PackedBatch, hidden: Tensor) -> TeacherRows:
        hidden_OY = hidden[packed.rows_O, 0]
        if loss in FULL_LOSSES:
            head = aligned_head(model, config, model.shape.vocab if vocab is None else vocab)
            # detached: of a student that teaches, no gradient may reach the head in this part
            return TeacherRows(hidden_OY=hidden_OY, head=replace(head, weight=head.weight.detach()), own_O=packed.own_O)
        head = head_of(model, config, vocab if within else None)
        found = row_logprobs(hidden_OY, head, packed.own(packed.targets_R))
        return TeacherRows(logprobs_R=all_rows(found.sampled_R, packed.own_O, len(packed.targets_R)))

    def last_stage(index: int, hidden: Tensor) -> tuple[Tensor, TeacherRows]:
        return hidden.new_zeros(()), report(packs[index], hidden)

    with on_this_device(), torch.no_grad():
        return run_schedule(model, packs, last_stage, train=False)


class HostWeights:
    """A model whose weights live in host memory, but for the time of a block. They never change.

    Nothing is copied back: the host keeps its copy, and what the device held is freed, except for what something else
    still refers to, as `TeacherRows.head` does until the step is over. Where the device is the CPU, both are one.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        """Move the weights of `model` out of `device`."""
        self._device = device
        self._pairs = [(parameter, _pinned(parameter.data)) for parameter in model.parameters()]
        self._leave()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Copy the weights to the device; forget that copy at the end of the block."""
        for parameter, host in self._pairs:
            parameter.data = _on_device(host, self._device)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter, host in self._pairs:
            parameter.data = host


def _pinned(tensor: Tensor) -> Tensor:
    """The tensor in host memory: page-locked where it comes from a GPU, the tensor itself where it is there already."""
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor


def _on_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; where that is the CPU, the tensor itself."""
    return host.to(device, non_blocking=True)
