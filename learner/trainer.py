"""One optimizer step on packed micro-batches, on every rank alike.

    StepBatch -> lay out -> [teacher's forward] -> [critic's values, advantages, and its gradient]
              -> forward -> rows -> LM head in chunks -> loss / tokens -> backward
                     (Megatron's schedule drives the micro-batches through the pipeline stages)
              -> gradients summed over data-parallel ranks -> clip -> AdamW on shards -> weights gathered

The loss of every micro-batch is divided by the step's global token count before the backward pass and gradients are
summed, so that neither micro-batching nor any parallel size changes the loss or the gradient. A step may come in parts
(`open_step`): `accumulate` takes every part but the last, `step` the last or only one, to the same gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from opd_async.learner.average import MovingTeacher
from opd_async.learner.config import LearnerConfig
from opd_async.learner.critic.critic import Critic
from opd_async.learner.distributed.cpu import on_this_device, this_device
from opd_async.learner.errors import LearnerError
from opd_async.learner.hf.io import load_hf
from opd_async.learner.losses.full_divergences import row_divergences
from opd_async.learner.losses.heads import head_of
from opd_async.learner.losses.logprobs import Entropy, RowLogprobs, row_logprobs
from opd_async.learner.losses.objective import full_objective, objective, support_of
from opd_async.learner.losses.own import OwnLoss, with_loss
from opd_async.learner.losses.sampled import LossOutput
from opd_async.learner.metrics import StepMetrics, Totals, reduce_over_ranks, step_metrics
from opd_async.learner.model.architecture import read_shape
from opd_async.learner.model.attention import has_varlen
from opd_async.learner.model.context import everywhere
from opd_async.learner.model.decoder import build_model
from opd_async.learner.model.layout import PackedBatch, lay_out
from opd_async.learner.model.pipeline import run_schedule
from opd_async.learner.open_step import OpenStep, rescale, without_sums
from opd_async.learner.optimizer import apply_gradient, finalize, learning_rate, make_optimizer, wrap
from opd_async.learner.teacher import LiveTeacher, Teacher, TeacherRows
from opd_async.transport.step_batch import MicroBatch, StepBatch

PADDING_SLACK = 0.125


class Trainer:
    """The model, its optimizer and the weight version: what a checkpoint holds."""

    def __init__(self, config: LearnerConfig) -> None:
        """Load the Hugging Face model of `config` on this rank. `learner.parallel.start` must have run."""
        self.config = config
        self.shape = read_shape(config.model_path)
        self.device = this_device()
        with on_this_device():
            self.model = build_model(self.shape, config).to(self.device)
        load_hf(self.model, config.model_path)
        self.vocab = self.shape.vocab if config.vocab is None else min(config.vocab, self.shape.vocab)
        self.teacher = self._make_teacher()
        # what the student begins as: it is compared over the ids that are sampled
        reference = config.reference
        self.reference = Teacher(config, reference, self.vocab, within=True) if reference is not None else None
        self.ddp = wrap(self.model)
        self.optimizer = make_optimizer(self.ddp, config.optim, bf16=config.dtype == "bfloat16")
        self.critic = Critic(config, config.critic, self.vocab) if config.critic is not None else None
        self._own_loss = OwnLoss(config.loss.function) if config.loss.function is not None else None
        self.version = 0
        self._open = OpenStep()
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        self.model.config.finalize_model_grads_func = finalize
        self.padding_slack = 0.0 if has_varlen(self.device, getattr(torch, config.dtype)) else PADDING_SLACK

    def _make_teacher(self) -> Teacher | LiveTeacher | None:
        teacher = self.config.teacher
        if teacher is None:
            return None
        if teacher.weights == "live":
            return LiveTeacher(self.config, self.model)
        kind = MovingTeacher if teacher.weights == "ema" else Teacher
        return kind(self.config, teacher, self.vocab)

    def accumulate(self, batch: StepBatch) -> None:
        """Add up the gradient of a part of a step that others follow. Weights and weight version stay.

        All ranks call it, with the same number of micro-batches. A critic whitens advantages over the whole step, so
        with one the parts are kept until the last is there. Raises `LearnerError` if the part is not the next one.
        """
        started = time.perf_counter()
        self._open.check(batch, self.version)
        self._open.parts += 1
        if self.critic is not None:
            self._open.held.append(batch)
        elif batch.loss_tokens:
            self._differentiate(self._open, batch, train=True, last=False)
        self._open.seconds += time.perf_counter() - started

    def step(self, batch: StepBatch) -> StepMetrics:
        """Train on `batch` and the parts before it once; the weight version grows by one.

        All ranks call it, with the same number of micro-batches. Raises `LearnerError`, before any weight has changed,
        if the batch is for another version or not the next part, if the ranks' rows do not add up to `loss_tokens`, or
        if the loss or its gradient is not finite.
        """
        started = time.perf_counter() - self._open.seconds
        self._open.check(batch, self.version)
        if self._open.held:
            batch, self._open = self._open.whole(batch), OpenStep()
        if self._open.tokens + batch.loss_tokens == 0:  # only empty responses: nothing to learn, but the step counts
            self.version, self._open = self.version + 1, OpenStep()
            return StepMetrics(version=self.version, tokens=0)
        own_step = self.version - (self.config.critic.only_steps if self.config.critic is not None else 0)
        totals = self.gradients(batch, train=own_step >= 0)
        rate = learning_rate(own_step, self.config.optim) if own_step >= 0 else 0.0
        grad_norm = self._update(rate) if own_step >= 0 else None
        if self.teacher is not None and own_step >= 0:
            self.teacher.follow(self.model)
        values = self.critic.update(self.version) if self.critic is not None else {}
        self.version += 1
        seconds = time.perf_counter() - started
        metrics = step_metrics(self.version, totals, grad_norm=grad_norm, learning_rate=rate, seconds=seconds)
        return replace(metrics, **values)

    def gradients(self, batch: StepBatch, *, train: bool = True) -> Totals:
        """The first half of a step: leave its gradient, that of earlier parts included, in the DDP buffers, the
        critic's in its own.

        Raises as `step` does. Without `train` the student is only looked at."""
        done, self._open = self._open, OpenStep()
        self._differentiate(done, batch, train=train, last=True)
        rescale(self.ddp, done.denominator / done.tokens)
        totals = reduce_over_ranks(done.reports, self.device)
        if totals.tokens != done.tokens:
            raise LearnerError(
                f"the ranks hold {totals.tokens} rows for weight version {batch.version}, but the batch "
                f"says {done.tokens} loss tokens"
            )
        if not math.isfinite(totals.sums["loss"]):
            raise LearnerError(
                f"the loss at weight version {batch.version} is {totals.sums['loss']}: look for a logprob that is not "
                f"finite in the batch, or lower learner.optimizer.lr"
            )
        return totals

    def _differentiate(self, step: OpenStep, batch: StepBatch, *, train: bool, last: bool) -> None:
        """Add the gradient of a part to the buffers, over its step's denominator; the `last` one sums over ranks."""

        def loss(index: int, hidden: Tensor) -> tuple[Tensor, Any]:
            output = self._objective(packs[index], hidden, teacher[index] if teacher is not None else None)
            return output.loss / step.denominator, (output.sums, output.maxima)

        packs = self.lay_out(batch.micro_batches)
        teacher = None
        if self.teacher is not None:
            teacher = self.teacher.rows(self._as_read_by_teacher(batch, packs), self.config.loss.loss)
            if self.config.contrast:
                beside = self.lay_out([mb.as_read_beside() for mb in batch.micro_batches])
                packs = _with("contrast_R", packs, self.teacher.rows(beside, "reverse_kl"))
            if self._plain_kl_is_due(batch):
                packs = _with("plain_R", packs, self.teacher.rows(packs, "reverse_kl"))
        if self.reference is not None:
            packs = _with("reference_R", packs, self.reference.rows(packs, "reverse_kl"))
        if self.critic is not None:
            packs = self.critic.advise(packs, batch.loss_tokens)
        first = step.add(batch)
        with on_this_device(), nullcontext() if train else torch.no_grad():
            if first:
                self.ddp.zero_grad_buffer()
            with without_sums(self.model.config, wanted=not last):
                step.reports += run_schedule(self.ddp, packs, loss, train=train)

    def logprobs(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """log p(target) of each micro-batch's rows under the current weights, nats: float32[R] each, no gradient.

        Over all rows of the student's table, as an engine scores a text.

        All ranks of a data-parallel rank call it; the list is empty but on the last pipeline stage.
        """

        def logprobs(index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            found = self._logprobs(packs[index], hidden, train=False).sampled_R
            return found.sum(), found

        packs = self.lay_out(batches)
        with on_this_device(), torch.no_grad():
            return run_schedule(self.ddp, packs, logprobs, train=False)

    def lay_out(self, batches: Sequence[MicroBatch]) -> list[PackedBatch]:
        """Micro-batches as this rank's models take them."""
        options: dict[str, Any] = {
            "multiple": self.config.parallel.tensor,
            "slack": self.padding_slack,
            "device": self.device,
            "frequent": self.config.frequent_tokens,
            "context": (parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()),
        }
        return [lay_out(batch, **options) for batch in batches]

    def _plain_kl_is_due(self, batch: StepBatch) -> bool:
        every = self.config.plain_kl_every
        return every > 0 and batch.version % every == 0

    def _as_read_by_teacher(self, batch: StepBatch, packs: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """The micro-batches with the prompts that the teacher reads; `packs` themselves where those are the student's.

        Rows are in the same order in both, so that what is said of one is said of the same token.
        """
        pairs = zip(batch.micro_batches, packs, strict=True)
        return [
            pack if mb.teacher_prompts is None else self.lay_out([mb.as_read_by_teacher()])[0] for mb, pack in pairs
        ]

    def _objective(self, packed: PackedBatch, hidden: Tensor, teacher: TeacherRows | None) -> LossOutput:
        """The loss of a micro-batch from the last stage's hidden states [P, 1, hidden] and what the teacher said."""
        if teacher is None:
            return self._of_rows(packed, hidden)
        if teacher.logprobs_R is not None:
            return self._of_rows(replace(packed, teacher_R=teacher.logprobs_R), hidden)
        assert teacher.head is not None
        found = row_divergences(
            hidden[packed.rows_O, 0],
            head_of(self.model, self.config, self.vocab),
            teacher.hidden_of(packed),
            teacher.head,
            packed.own(packed.targets_R),
            loss=self.config.loss.loss,
            beta=self.config.loss.jsd_beta,
            entropy=self.config.frequent_tokens > 0,
        )
        return full_objective(packed, everywhere(found, packed.own_O, len(packed.targets_R)), self.config.loss)

    def _of_rows(self, packed: PackedBatch, hidden: Tensor) -> LossOutput:
        """The configured loss, or the user's own, from the logprobs of the rows."""
        found = self._logprobs(packed, hidden, train=True)
        output = objective(packed, found, self.config.loss)
        return output if self._own_loss is None else with_loss(output, self._own_loss(packed, found))

    def _logprobs(self, packed: PackedBatch, hidden: Tensor, *, train: bool) -> RowLogprobs:
        """From the last stage's hidden states [P, 1, hidden]; the support of the loss only to `train`."""
        support_RK, tail = support_of(packed, self.config.loss) if train else (None, False)
        found = row_logprobs(
            hidden[packed.rows_O, 0],
            head_of(self.model, self.config, self.vocab if train else None),
            packed.own(packed.targets_R),
            None if support_RK is None else packed.own(support_RK),
            tail=tail,
            entropy=self._entropy if train else None,
        )
        return everywhere(found, packed.own_O, len(packed.targets_R))

    @property
    def _entropy(self) -> Entropy | None:
        """What the student's entropy is for: a bonus, or, where a teacher reads what it does not, a figure."""
        if self.config.loss.entropy_coef > 0.0:
            return Entropy.TRAINED
        return Entropy.SEEN if self.config.frequent_tokens else None

    def _update(self, rate: float) -> float:
        """Clip and apply the gradient; returns its global L2 norm before clipping."""
        grad_norm = apply_gradient(self.optimizer, rate, self.config.optim.clip_grad)
        if not math.isfinite(grad_norm):
            raise LearnerError(
                f"the gradient at weight version {self.version} has norm {grad_norm}: lower learner.optimizer.lr, or "
                f"set opd.signal_clamp"
            )
        return grad_norm


def _with(name: str, packs: Sequence[PackedBatch], rows: Sequence[TeacherRows]) -> list[PackedBatch]:
    """The micro-batches with what another model says of their rows, as field `name`. `rows` are empty but on the last
    pipeline stage, which alone needs them."""
    said: list[dict[str, Any]] = [{name: row.logprobs_R} for row in rows]
    return [replace(pack, **fields) for pack, fields in zip(packs, said, strict=False)] or list(packs)
