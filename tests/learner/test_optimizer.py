"""The optimizer is torch's AdamW with a clipped gradient, and decays matrices alone; so is the critic's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_learner import assert_close, learner_config, micro_batch, step_batch, write_model

from opd_async.learner import resume
from opd_async.learner.config import CriticConfig, OptimConfig
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.optimizer import apply_gradient, learning_rate
from opd_async.learner.trainer import Trainer

OPTIM = OptimConfig(
    lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3, clip_grad=1e9, total_steps=10, decay="constant"
)


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def adamw(weights: dict[str, torch.Tensor], config: OptimConfig) -> torch.optim.AdamW:
    """torch's AdamW, without decay on what has one dimension."""
    groups = [
        {"params": [w for w in weights.values() if w.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [w for w in weights.values() if w.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def shake(model: torch.nn.Module, seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Random gradients in the buffers that the optimizer reads; returns copies."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():
        parameter.main_grad.copy_(scale * torch.randn(parameter.shape, generator=generator))
        found[name] = parameter.main_grad.clone()
    return found


def learning(trainer: Trainer, who: str) -> tuple[torch.nn.Module, Any]:
    if who == "student":
        return trainer.model, trainer.optimizer
    assert trainer.critic is not None
    return trainer.critic.model, trainer.critic.optimizer


@pytest.mark.parametrize("kind", ["qwen3-tied", "qwen2"])
@pytest.mark.parametrize("who", ["student", "critic"])
def test_steps_are_those_of_adamw_without_decay_on_norms_and_biases(
    alone: Place, tmp_path: Path, who: str, kind: str
) -> None:
    path = write_model(tmp_path / kind, kind)
    trainer = Trainer(learner_config(path, optim=OPTIM, critic=CriticConfig(model_path=path, optim=OPTIM)))
    model, optimizer = learning(trainer, who)
    assert any(name.endswith("bias") for name, _ in model.named_parameters()) is (who == "critic" or kind == "qwen2")
    expected = copies(model)
    reference = adamw(expected, OPTIM)
    for seed in range(3):
        gradients = shake(model, seed)
        for name, weight in expected.items():
            weight.grad = gradients[name]
        reference.step()
        apply_gradient(optimizer, OPTIM.lr, OPTIM.clip_grad)
        assert_close(copies(model), expected, 1e-6)


def test_the_gradient_is_clipped_to_its_global_norm(alone: Place, model_path: Path) -> None:
    """Adam's first step hides a gradient's scale, the next do not: far below the bound, just below it, far above."""
    config = replace(OPTIM, clip_grad=0.5)
    trainer = Trainer(learner_config(model_path, optim=config))
    expected = copies(trainer.model)
    reference = adamw(expected, config)
    just_below = 0.7 * config.clip_grad / sum(weight.numel() for weight in expected.values()) ** 0.5
    for seed, scale in enumerate((1e-4, just_below, 1.0)):
        gradients = shake(trainer.model, seed, scale)
        for name, weight in expected.items():
            weight.grad = gradients[name]
        norm = torch.nn.utils.clip_grad_norm_(list(expected.values()), config.clip_grad)
        assert (float(norm) > config.clip_grad) is (scale == 1.0)
        reference.step()
        assert apply_gradient(trainer.optimizer, config.lr, config.clip_grad) == pytest.approx(float(norm), rel=1e-5)
    assert_close(copies(trainer.model), expected, 1e-6)


@pytest.mark.parametrize("who", ["student", "critic"])
def test_a_step_of_the_run_clips_to_its_own_bound(alone: Place, model_path: Path, who: str) -> None:
    """Two steps of the whole learner: with a bound far below the norm, momentum and weights are others."""
    batch = micro_batch([9, 31, 14])

    def after(clip: float) -> dict[str, torch.Tensor]:
        optim = replace(OPTIM, weight_decay=0.0, clip_grad=clip, eps=1e-3)
        trainer = Trainer(
            learner_config(model_path, optim=optim, critic=CriticConfig(model_path=model_path, optim=optim))
        )
        trainer.step(step_batch(0, [batch]))
        return copies(learning(trainer, who)[0])

    free, bound = after(1e9), after(1e-4)
    assert max(float((free[name] - bound[name]).abs().max()) for name in free) > 1e-4


def test_a_gradient_that_is_not_finite_changes_nothing(alone: Place, model_path: Path) -> None:
    trainer = Trainer(learner_config(model_path, optim=OPTIM))
    before = copies(trainer.model)
    shake(trainer.model, 0)
    next(trainer.model.parameters()).main_grad.view(-1)[0] = torch.inf  # type: ignore[attr-defined]
    assert apply_gradient(trainer.optimizer, OPTIM.lr, OPTIM.clip_grad) == float("inf")
    assert_close(copies(trainer.model), before, 0.0)


def test_what_does_not_decay_is_remembered_by_a_resumed_run(alone: Place, model_path: Path, tmp_path: Path) -> None:
    config = learner_config(model_path, optim=OPTIM, critic=CriticConfig(model_path=model_path, optim=OPTIM))
    trainer, other = Trainer(config), Trainer(config)
    trainer.step(step_batch(0, [micro_batch([9, 31, 14])]))
    resume.save(trainer, tmp_path / "saved")
    resume.load(other, tmp_path / "saved")
    for who in ("student", "critic"):
        _, optimizer = learning(other, who)
        decays = {group["wd_mult"]: group["weight_decay"] for group in optimizer.param_groups}
        assert decays == {0.0: 0.0, 1.0: OPTIM.weight_decay}


@pytest.mark.parametrize(
    ("decay", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", [0.5, 1.0, 1.0, 0.8828427, 0.6, 0.3171573, 0.2, 0.2]),
    ],
)
def test_learning_rates(decay: str, rates: list[float]) -> None:
    """A warm-up of two steps that moves from the first one on, then four of decay to a fifth."""
    config = OptimConfig(lr=1.0, warmup_steps=2, total_steps=6, decay=decay, min_lr_ratio=0.2)  # type: ignore[arg-type]
    assert [learning_rate(step, config) for step in range(len(rates))] == pytest.approx(rates, abs=1e-6)
    assert learning_rate(0, replace(config, warmup_steps=0)) == 1.0
    assert learning_rate(5, replace(config, warmup_steps=0, total_steps=0)) == pytest.approx(rates[-1])
