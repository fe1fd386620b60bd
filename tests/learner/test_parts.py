"""A step that comes in parts is the step that comes at once; on several ranks: test_ranks.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_learner import EMPTY, assert_close, hf_gradients, learner_config, micro_batch, split, step_batch, write_model

from opd_async.config.losses import FULL_LOSSES, TOPK_LOSSES
from opd_async.learner.config import CriticConfig, LearnerConfig, LossConfig, OptimConfig, ParallelConfig, TeacherConfig
from opd_async.learner.convert import hf_to_megatron
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import LearnerError
from opd_async.learner.trainer import Trainer
from opd_async.transport.step_batch import StepBatch

LOSSES = {
    "reverse_kl": LossConfig(),
    "gspo": LossConfig(ratio="sequence", clip_ratio=0.05, clip_high=0.1),
    "cispo with entropy": LossConfig(ratio="truncated", clip_ratio=1.0, clip_high=0.3, entropy_coef=0.1),
    "dual clip": LossConfig(dual_clip=1.5, clip_high=0.3),
    **{name: LossConfig(loss=name) for name in sorted(TOPK_LOSSES)},
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "qwen3-tied")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, alone: Place) -> TeacherConfig:
    folder = tmp_path_factory.mktemp("teacher")
    path = write_model(folder / "hf", "teacher")
    hf_to_megatron(path, folder / "megatron", ParallelConfig())
    return TeacherConfig(model_path=path, load=folder / "megatron")


def parts_of(version: int) -> list[StepBatch]:
    """A step of three sequences, another of one and an empty response, as five parts."""
    packed = split(micro_batch([9, 31, 14, 22], seed=version, k=4))
    cut = ([EMPTY], packed[:2], [packed[2]], [EMPTY], [packed[3], EMPTY])
    return [replace(step_batch(version, list(part)), part=i, last=i == len(cut) - 1) for i, part in enumerate(cut)]


def at_once(version: int) -> StepBatch:
    return step_batch(version, [micro_batch([9, 31, 14, 22], seed=version, k=4)])


def check(config: LearnerConfig) -> None:
    """Gradients, and two steps: the second begins where the first has led."""
    one, many = Trainer(config), Trainer(config)
    if one.critic is None:
        *parts, last = parts_of(0)
        for part in parts:
            many.accumulate(part)
        assert_close(hf_gradients(many, last), hf_gradients(one, at_once(0)), 1e-6)
    for version in range(2):
        *parts, last = parts_of(version)
        for part in parts:
            many.accumulate(part)
            assert many.version == version
        found, expected = many.step(last), one.step(at_once(version))
        assert (found.version, found.tokens) == (version + 1, expected.tokens)
        known = found.known() | {"seconds": 0.0}
        assert known == pytest.approx(expected.known() | {"seconds": 0.0}, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_every_loss(alone: Place, model_path: Path, loss: LossConfig) -> None:
    check(learner_config(model_path, loss=loss))


@pytest.mark.parametrize("name", [*sorted(FULL_LOSSES), "reverse_kl"])
def test_a_teacher_inside(alone: Place, model_path: Path, teacher: TeacherConfig, name: str) -> None:
    check(replace(learner_config(model_path, loss=LossConfig(loss=name)), teacher=teacher))


def test_a_reference(alone: Place, model_path: Path, teacher: TeacherConfig) -> None:
    check(replace(learner_config(model_path, loss=LossConfig(reference_kl_coef=0.5)), reference=teacher))


def test_a_critic(alone: Place, model_path: Path) -> None:
    """Advantages are whitened over the step, not over its parts."""
    critic = CriticConfig(
        model_path=model_path, optim=OptimConfig(lr=1e-3, total_steps=10), value_clip=0.05, updates=2, lam=0.9
    )
    check(replace(learner_config(model_path), critic=critic))


def test_a_part_that_is_not_the_next_is_refused(alone: Place, model_path: Path) -> None:
    trainer, (first, second, *_) = Trainer(learner_config(model_path)), parts_of(0)
    trainer.accumulate(first)
    with pytest.raises(LearnerError, match="part 0 of the step at weight version 0 came after 1"):
        trainer.accumulate(first)
    trainer.accumulate(second)
    with pytest.raises(LearnerError, match="part 0 of the step at weight version 0 came after 2"):
        trainer.step(at_once(0))
    with pytest.raises(LearnerError, match="weight version 1 reached a learner at 0"):
        trainer.accumulate(replace(second, version=1))
    assert trainer.version == 0


def test_rows_that_do_not_add_up_over_all_parts_are_refused(alone: Place, model_path: Path) -> None:
    trainer = Trainer(learner_config(model_path))
    *parts, last = parts_of(0)
    parts[1] = replace(parts[1], loss_tokens=parts[1].loss_tokens - 1)
    for part in parts:
        trainer.accumulate(part)
    with pytest.raises(LearnerError, match="the ranks hold"):
        trainer.step(last)


def test_a_step_without_a_token_in_any_part_counts(alone: Place, model_path: Path) -> None:
    trainer = Trainer(learner_config(model_path))
    trainer.accumulate(replace(step_batch(0, [EMPTY]), last=False))
    found = trainer.step(replace(step_batch(0, [EMPTY]), part=1))
    assert (found.version, found.tokens, trainer.version) == (1, 0, 1)
