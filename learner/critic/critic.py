"""The critic of PPO in the learner's ranks: split like the student, with an optimizer of its own.

    micro-batches of a step -> forward -> values -> rewards, values: advantages and returns (`opd_async.estimators.gae`)
        -> value loss -> backward -> the critic's gradient
    advantages -> whitened over the step's tokens, all ranks -> the student's loss
    both gradients are there -> the student's update -> the critic's update, and further ones on the same returns

The forward pass that gives the values is the one that the first gradient goes back through, so a step costs the critic
one forward and one backward pass per update. Only the last pipeline stage sees values. The critic is in the learner's
checkpoints, and in no export and no weight update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd_async.estimators.gae import Estimates, gae, whitened
from opd_async.learner.config import CriticConfig, LearnerConfig
from opd_async.learner.critic.value_loss import VALUE_SUMS, ValueRows, value_loss
from opd_async.learner.critic.value_model import ValueModel, build_value_model, load_critic
from opd_async.learner.distributed.cpu import on_this_device, this_device
from opd_async.learner.errors import LearnerError, ModelError
from opd_async.learner.hf.io import load_hf
from opd_async.learner.metrics import reduce_sums
from opd_async.learner.model.architecture import read_shape
from opd_async.learner.model.context import all_rows
from opd_async.learner.model.layout import PackedBatch
from opd_async.learner.model.pipeline import run_schedule
from opd_async.learner.optimizer import apply_gradient, finalize, learning_rate, make_optimizer, wrap

ADVANTAGE_SUMS = ("advantage", "squared_advantage")


@dataclass(frozen=True, slots=True)
class Judged:
    """What the critic made of a micro-batch."""

    estimates: Estimates
    rows: ValueRows


class Critic:
    """The critic's part on this rank, and what it knows of the step under way."""

    def __init__(self, config: LearnerConfig, critic: CriticConfig, vocab: int) -> None:
        """Load the weights; all ranks call it, after `learner.parallel.start`.

        Ids below `vocab` are sampled. Raises `ModelError` if the critic cannot be split like the student or has no row
        for one of them, `CheckpointError` if its checkpoint is not one of `model_path`'s shape.
        """
        self.config = critic
        shape = read_shape(critic.model_path)
        if shape.vocab < vocab:
            raise ModelError(
                f"the critic in {critic.model_path} has a vocabulary of {shape.vocab}, but ids up to {vocab - 1} are "
                "sampled; choose a larger one"
            )
        self._device = this_device()
        with on_this_device():
            self.model: ValueModel = build_value_model(shape, config).to(self._device)
        if critic.load is None:
            load_hf(self.model, critic.model_path)
        else:
            load_critic(self.model, critic.load)
        self.ddp = wrap(self.model)
        self.optimizer = make_optimizer(self.ddp, critic.optim, bf16=config.dtype == "bfloat16")
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        self.model.config.finalize_model_grads_func = finalize
        self._packs: Sequence[PackedBatch] = ()
        self._loss_tokens = 0
        self._judged: list[Judged] = []
        self._sums: dict[str, float] = {}

    def advise(self, packs: Sequence[PackedBatch], loss_tokens: int) -> list[PackedBatch]:
        """The same micro-batches with advantages made of rewards and values, whitened over the step's tokens; leaves
        the gradient of the value loss in the DDP buffers.

        All ranks call it. Stages other than the last get `packs` back. Raises `LearnerError` when rows come without
        rewards, or a value is not finite; no weight has changed then.
        """

        def first(index: int, hidden: Tensor) -> tuple[Tensor, Any]:
            values_R = self._values(packs[index], hidden)
            judged = self._judge(packs[index], values_R.detach())
            loss, sums = value_loss(values_R, judged.rows, self.config.value_clip)
            return loss / loss_tokens, (judged, torch.cat([sums, _moments(judged.estimates, sums)]))

        self._packs, self._loss_tokens = packs, loss_tokens
        self._judged, reports = [], []
        for judged, sums in self._differentiate(packs, first):
            self._judged.append(judged)
            reports.append(sums)
        names = VALUE_SUMS + ADVANTAGE_SUMS
        self._sums = dict(zip(names, reduce_sums(reports, len(names), self._device), strict=True))
        if not math.isfinite(self._sums["loss"]):
            raise LearnerError(f"the value loss is {self._sums['loss']}: lower advantage.critic.lr")
        rows = max(self._sums["rows"], 1.0)
        mean = self._sums["advantage"] / rows
        variance = self._sums["squared_advantage"] / rows - mean**2
        white = (torch.from_numpy(whitened(judged.estimates, mean, variance)) for judged in self._judged)
        advised = [
            replace(pack, advantages_R=values_R.to(self._device))
            for pack, values_R in zip(packs, white, strict=False)  # no values but on the last stage
        ]
        return advised or list(packs)

    def update(self, step: int) -> dict[str, Any]:
        """Apply the gradient that `advise` left, as step `step` of the run, and take what further updates there are on
        the same batch; returns what `StepMetrics` says of the critic. All ranks call it."""

        def again(index: int, hidden: Tensor) -> tuple[Tensor, Any]:
            rows = self._judged[index].rows
            loss, sums = value_loss(self._values(packs[index], hidden), rows, self.config.value_clip)
            return loss / self._loss_tokens, sums

        packs, rate = self._packs, learning_rate(step, self.config.optim)
        sums, norm = self._sums, self._apply(rate)
        for _ in range(1, self.config.updates):
            reports = self._differentiate(packs, again)
            sums = dict(zip(VALUE_SUMS, reduce_sums(reports, len(VALUE_SUMS), self._device), strict=True))
            norm = self._apply(rate)
        rows, first = sums["rows"], self._sums
        if not rows:  # no response has a reward
            return {"critic_grad_norm": norm}
        return {
            "value_loss": first["loss"] / rows,
            "value_mean": first["value"] / rows,
            "explained_variance": explained_variance(first),
            "value_clipped_share": sums["clipped"] / rows,
            "critic_grad_norm": norm,
        }

    def values(self, packs: Sequence[PackedBatch]) -> list[Tensor]:
        """float32[R] per micro-batch under the current weights, without gradient; empty but on the last stage."""

        def report(index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            values_R = self._values(packs[index], hidden)
            return values_R.sum(), values_R

        with on_this_device(), torch.no_grad():
            return run_schedule(self.ddp, packs, report, train=False)

    def _differentiate(self, packs: Sequence[PackedBatch], loss: Any) -> list[Any]:
        with on_this_device():
            self.ddp.zero_grad_buffer()
            return run_schedule(self.ddp, packs, loss, train=True)

    def _values(self, packed: PackedBatch, hidden: Tensor) -> Tensor:
        """float32[R], from the last stage's hidden states [P, 1, hidden]: of the prefix before each row's token."""
        return all_rows(self.model.values(hidden[packed.rows_O, 0]), packed.own_O, len(packed.targets_R))

    def _judge(self, packed: PackedBatch, values_R: Tensor) -> Judged:
        """Advantages and returns of a micro-batch, which holds whole responses."""
        rewards_R = packed.rewards_R
        if rewards_R is None:
            if len(packed.targets_R):
                raise LearnerError("the critic needs the rewards of the responses, and the batch has none")
            rewards_R = values_R.new_zeros(0).cpu().numpy()
        estimates = gae(
            values_R.cpu().numpy(),
            packed.sequence_R.cpu().numpy(),
            rewards_R,
            gamma=self.config.gamma,
            lam=self.config.lam,
        )
        returns_R = torch.from_numpy(estimates.returns_R).float().to(self._device)
        known_R = torch.from_numpy(estimates.known_R).to(self._device)
        return Judged(estimates, ValueRows(values_R, returns_R, known_R, packed.weights_R))

    def _apply(self, rate: float) -> float:
        norm = apply_gradient(self.optimizer, rate, self.config.optim.clip_grad)
        if not math.isfinite(norm):
            raise LearnerError(f"the critic's gradient has norm {norm}: lower advantage.critic.lr")
        return norm


def _moments(estimates: Estimates, like: Tensor) -> Tensor:
    """float64[len(ADVANTAGE_SUMS)]: advantages and their squares, summed; those without a reward are zero."""
    advantages_R = estimates.advantages_R
    sums = [float(advantages_R.sum()), float((advantages_R**2).sum())]
    return torch.tensor(sums, dtype=torch.float64, device=like.device)


def explained_variance(sums: dict[str, float]) -> float | None:
    """1 - var(return - value) / var(return) over the step's rows: 1 for a critic that is always right, 0 for one that
    says the same of every prefix. None where returns do not differ: there is nothing to explain."""
    rows = max(sums["rows"], 1.0)
    variance = sums["squared_return"] / rows - (sums["return"] / rows) ** 2
    left = sums["squared_error"] / rows - (sums["error"] / rows) ** 2
    return 1.0 - left / variance if variance > 1e-12 else None
