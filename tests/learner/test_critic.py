"""The critic: what it learns from a batch, what the student is told, and that a run with one resumes exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_learner import EMPTY, assert_close, hf_gradients, learner_config, micro_batch, split, step_batch, write_model

from opd_async.estimators.gae import gae
from opd_async.learner import resume
from opd_async.learner.config import CriticConfig, LossConfig, OptimConfig, ParallelConfig
from opd_async.learner.convert import hf_to_megatron
from opd_async.learner.critic.critic import Critic
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import CheckpointError, LearnerError, ModelError
from opd_async.learner.hf.io import hf_weights
from opd_async.learner.trainer import Trainer
from opd_async.transport.step_batch import MicroBatch

OPTIM = OptimConfig(lr=3e-3, warmup_steps=2, total_steps=10)


def rewarded(lengths: list[int], seed: int = 0, *, unjudged: int = -1) -> MicroBatch:
    """Whole responses with a reward each, but for one."""
    batch = micro_batch(lengths, seed=seed, k=4)
    if unjudged >= 0:
        assert batch.rewards is not None
        start, end = batch.cu_seqlens[unjudged : unjudged + 2]
        batch.rewards[(batch.rows >= start) & (batch.rows < end)] = np.nan
    return replace(batch, advantages=np.zeros_like(batch.advantages))


def with_critic(student: Path, loss: LossConfig | None = None, **changes: Any) -> Trainer:
    critic = CriticConfig(model_path=student, optim=OPTIM, gamma=0.95, lam=0.9)
    return Trainer(learner_config(student, loss=loss or LossConfig(), critic=replace(critic, **changes)))


def seasoned(trainer: Trainer) -> Critic:
    """The trainer's critic with a head that says something: with a new one, no gradient reaches the body."""
    assert trainer.critic is not None
    head = trainer.critic.model.output_layer
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        head.weight.copy_(0.3 * torch.randn(head.weight.shape, generator=generator))
        head.bias.fill_(0.1)
    return trainer.critic


def critic_gradient(critic: Critic) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in critic.model.named_parameters()}


def test_micro_batching_changes_neither_gradient(alone: Place, model_path: Path) -> None:
    packed = rewarded([9, 31, 14, 30, 22, 5, 13, 40], unjudged=2)
    parts = split(packed)
    trainer = with_critic(model_path)
    critic = seasoned(trainer)
    whole = hf_gradients(trainer, step_batch(0, [packed]))
    by_whole = critic_gradient(critic)
    assert min(float(gradient.abs().max()) for gradient in by_whole.values()) > 1e-5
    assert_close(hf_gradients(trainer, step_batch(0, [*parts, EMPTY])), whole, 1e-6)
    assert_close(critic_gradient(critic), by_whole, 1e-6)


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd_topk"])
def test_the_student_gets_whitened_advantages_beside_the_signal(alone: Place, model_path: Path, loss: str) -> None:
    """As if they had come with the rows: the signal is added behind the whitening, and neither scales the other."""
    batch = rewarded([9, 31, 14], unjudged=1)
    assert batch.rewards is not None
    trainer = with_critic(model_path, LossConfig(loss=loss, kl_coef=0.3))
    critic = seasoned(trainer)
    sequence = np.searchsorted(batch.cu_seqlens, batch.rows, side="right") - 1
    (values,) = critic.values(trainer.lay_out([batch]))
    found = gae(values.numpy(), sequence, batch.rewards, gamma=0.95, lam=0.9)
    known = found.advantages_R[found.known_R]
    white = np.where(found.known_R, (found.advantages_R - known.mean()) / known.std(), 0.0)
    by_hand = Trainer(replace(trainer.config, critic=None))
    expected = hf_gradients(by_hand, step_batch(0, [replace(batch, advantages=white.astype(np.float32))]))
    assert_close(hf_gradients(trainer, step_batch(0, [batch])), expected, 1e-6)
    # and the critic's gradient is that of its loss, differentiated anew
    returns = torch.from_numpy(found.returns_R).float()
    model, packed = critic.model, trainer.lay_out([batch])[0]
    again = model.values(model(packed)[packed.rows_O, 0])
    known_R = torch.from_numpy(found.known_R)
    wanted = torch.autograd.grad(
        (0.5 * (again - returns).square() * known_R).sum() / len(batch.rows), list(model.parameters())
    )
    names = [name for name, _ in model.named_parameters()]
    assert_close(critic_gradient(critic), dict(zip(names, wanted, strict=True)), 1e-6)


def test_the_critic_learns_what_a_batch_is_worth(alone: Place, model_path: Path) -> None:
    batch = step_batch(0, [rewarded([9, 31, 14, 20])])
    trainer = with_critic(model_path, gamma=1.0, lam=1.0, only_steps=8)
    body = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    rows = [trainer.step(replace(batch, version=version)) for version in range(8)]
    assert (rows[0].value_mean, rows[0].explained_variance) == (0.0, pytest.approx(0.0, abs=1e-9))
    first, last = rows[0].known(), rows[-1].known()
    assert last["value_loss"] < 0.3 * first["value_loss"] and last["explained_variance"] > 0.5
    assert all(row.known()["critic_grad_norm"] > 0.0 and row.learning_rate == 0.0 for row in rows)
    assert all(row.grad_norm is None for row in rows)
    assert rows[0].reverse_kl == pytest.approx(rows[-1].reverse_kl) and rows[0].reverse_kl != 0.0
    assert all(torch.equal(a, b) for a, b in zip(body, trainer.model.parameters(), strict=True))
    first = trainer.step(replace(batch, version=8))
    assert first.learning_rate == pytest.approx(1.5e-3) and first.grad_norm > 0.0  # the first step of its warm-up
    assert any(not torch.equal(a, b) for a, b in zip(body, trainer.model.parameters(), strict=True))


def test_further_updates_of_a_step_meet_the_clip(alone: Place, model_path: Path) -> None:
    batch = step_batch(0, [rewarded([9, 31, 14, 20])])
    once = with_critic(model_path, value_clip=1e-4).step(batch)
    assert once.value_clipped_share == 0.0
    often, bound = (with_critic(model_path, updates=6, value_clip=clip) for clip in (None, 1e-4))
    rows = often.step(batch), bound.step(batch)
    assert rows[0].value_clipped_share == 0.0 < rows[1].value_clipped_share
    assert rows[1].known()["critic_grad_norm"] < rows[0].known()["critic_grad_norm"]
    after = [trainer.step(replace(batch, version=1)).known()["value_loss"] for trainer in (often, bound)]
    assert after[0] < after[1] < once.known()["value_loss"]


def test_nothing_is_learnt_of_responses_without_rewards(alone: Place, model_path: Path) -> None:
    batch = replace(rewarded([9, 14]), teacher_logprobs=np.zeros(0, np.float32))
    batch = replace(batch, rewards=np.full(len(batch.rows), np.nan, np.float32))
    metrics = with_critic(model_path).step(step_batch(0, [batch]))
    assert metrics.grad_norm == metrics.critic_grad_norm == 0.0
    assert metrics.value_loss is metrics.value_mean is metrics.explained_variance is metrics.value_clipped_share is None
    assert metrics.reverse_kl is metrics.k3 is None  # nor is there a teacher
    with pytest.raises(LearnerError, match="the critic needs the rewards of the responses"):
        with_critic(model_path).step(step_batch(0, [replace(batch, rewards=None)]))


def test_weights_make_a_mean_over_responses_of_the_value_loss(alone: Place, model_path: Path) -> None:
    batch = rewarded([9, 31])
    trainer = with_critic(model_path)
    critic = seasoned(trainer)
    each = []
    for part in split(batch):
        trainer.gradients(step_batch(0, [part]))
        each.append(critic_gradient(critic))
    counts = np.array([7, 29])
    weights = np.repeat(36 / (2 * counts), counts).astype(np.float32)
    trainer.gradients(step_batch(0, [replace(batch, weights=weights)]))
    assert_close(critic_gradient(critic), {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_a_critic_resumes_bit_for_bit(alone: Place, model_path: Path, tmp_path: Path, dtype: str) -> None:
    def steps(trainer: Trainer, count: int) -> list[tuple[float, ...]]:
        rows = (trainer.step(step_batch(trainer.version, [rewarded([9, 20], trainer.version)])) for _ in range(count))
        return [(row.loss, row.grad_norm, row.value_loss, row.value_mean, row.critic_grad_norm) for row in rows]

    critic = CriticConfig(model_path=model_path, optim=OPTIM, updates=2, only_steps=1)
    config = learner_config(model_path, dtype=dtype, critic=critic)
    trainer = Trainer(config)
    steps(trainer, 2)
    resume.save(trainer, tmp_path / "learner")
    exported = {name: tensor.clone() for name, tensor in hf_weights(trainer.model)}
    expected = steps(trainer, 4)
    resumed = Trainer(config)
    resume.load(resumed, tmp_path / "learner")
    assert steps(resumed, 4) == expected
    # another run takes the student alone, or begins with this critic
    plain = Trainer(replace(config, critic=None))
    resume.load(plain, tmp_path / "learner")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in hf_weights(plain.model))
    other = Trainer(replace(config, critic=replace(critic, load=tmp_path / "learner")))
    assert other.critic is not None and bool(other.critic.model.output_layer.weight.any())


def test_what_a_critic_begins_with(alone: Place, model_path: Path, tmp_path: Path) -> None:
    hf_to_megatron(model_path, tmp_path / "converted", ParallelConfig())
    trainer = with_critic(model_path, load=tmp_path / "converted")
    assert trainer.critic is not None
    loaded, taken = (dict(t.critic.model.named_parameters()) for t in (trainer, with_critic(model_path)) if t.critic)
    assert loaded.keys() == taken.keys() and all(torch.equal(loaded[name], taken[name]) for name in loaded)
    resume.save(Trainer(learner_config(model_path)), tmp_path / "without")
    with pytest.raises(CheckpointError, match="has no critic: it was saved with another"):
        resume.load(trainer, tmp_path / "without")
    wider = write_model(tmp_path / "wider", "teacher")  # a shape of its own
    metrics = with_critic(model_path, model_path=wider).step(step_batch(0, [rewarded([9, 14])]))
    assert metrics.known()["critic_grad_norm"] > 0.0
    with pytest.raises(CheckpointError, match=r"the critic: .*; its shape is read from advantage.critic.path"):
        with_critic(model_path, model_path=wider, load=tmp_path / "converted")
    with pytest.raises(ModelError, match="a vocabulary of 33, but ids up to 33 are sampled"):
        Critic(trainer.config, CriticConfig(model_path=model_path), 34)
