"""A loss on the difference of two scores of the teacher's: its numbers by hand, and from a teacher in the learner."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_learner import (
    EMPTY,
    VOCAB,
    assert_close,
    hf_gradients,
    learner_config,
    micro_batch,
    read_differently,
    sequences_of_teacher,
    split,
    step_batch,
    write_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from opd_async.learner.config import LearnerConfig, LossConfig, TeacherConfig
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.trainer import Trainer
from opd_async.transport.step_batch import MicroBatch, TeacherPrompts

MODULE = """
from opd_async import LossOutput, LossRows

def contrast(rows: LossRows) -> LossOutput:
    signal = rows.teacher_R - rows.contrast_R
    return LossOutput(-((rows.logprobs_R - rows.behaviour_R).exp() * signal).sum())
"""
LOSS = LossConfig(loss="reverse_kl", function="contrast_loss:contrast", clip_ratio=None)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "contrast_loss.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("contrast_loss", None)


def contrasted(lengths: list[int]) -> MicroBatch:
    """A micro-batch with a second score of each row."""
    batch = micro_batch(lengths)
    second = -4.0 * np.random.default_rng(7).random(len(batch.rows))
    return replace(batch, contrast_logprobs=second.astype(np.float32))


def hf(path: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model


def logprobs(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """float32[R] of the targets by transformers, a forward pass for each sequence, behind the teacher's prompts."""
    parts, bounds = [], batch.cu_seqlens.tolist()
    for index, (ids, moved) in enumerate(sequences_of_teacher(batch)):
        start, end = bounds[index], bounds[index + 1]
        rows = torch.tensor([row - start + moved for row in batch.rows.tolist() if start <= row < end])
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        parts.append(table[rows, torch.tensor(ids)[rows + 1]])
    return torch.cat(parts)


def test_loss_and_gradient_are_those_of_the_numbers_by_hand(alone: Place, model_path: Path) -> None:
    """mean of -rho (log q_right - log q_wrong), in one micro-batch, in several, and in two parts."""
    batch = contrasted([9, 31, 14])
    assert batch.contrast_logprobs is not None
    signal = torch.from_numpy(batch.teacher_logprobs - batch.contrast_logprobs)
    model = hf(model_path)
    rho = (logprobs(model, batch) - torch.from_numpy(batch.behaviour_logprobs)).exp()
    expected = -(rho * signal).mean()
    expected.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(float(gradient.abs().max()) for gradient in wanted.values()) > 1e-2

    trainer = Trainer(learner_config(model_path, loss=LOSS))
    totals = trainer.gradients(step_batch(0, [batch]))
    assert totals.mean("loss") == pytest.approx(float(expected.detach()), abs=1e-6)
    assert totals.mean("contrast") == pytest.approx(float(signal.mean()), abs=1e-6)
    assert_close(hf_gradients(trainer, step_batch(0, [batch])), wanted, 1e-6)
    assert_close(hf_gradients(trainer, step_batch(0, [*split(batch), EMPTY])), wanted, 1e-6)
    first, *rest = split(batch)
    trainer.accumulate(replace(step_batch(0, [first]), last=False))
    assert_close(hf_gradients(trainer, replace(step_batch(0, rest), part=1)), wanted, 1e-6)


def config_of(model_path: Path, teacher: TeacherConfig) -> LearnerConfig:
    return learner_config(model_path, loss=LOSS, teacher=teacher, contrast=True)


@pytest.mark.parametrize("live", [False, True])
def test_a_teacher_in_the_learner_reads_both_prompts(
    alone: Place, model_path: Path, tmp_path: Path, live: bool
) -> None:
    """The same gradient as with a teacher elsewhere that has sent the scores of transformers behind both."""
    path = model_path if live else write_model(tmp_path / "teacher", "teacher")
    batch = read_differently(micro_batch([5, 23, 30, 11]), seed=1)
    wrong = read_differently(batch, seed=2).teacher_prompts
    assert wrong is not None
    # every sequence has a wrong hint, those too whose teacher reads what the student reads
    lengths = np.full(4, 3, np.int32)
    ids = np.random.default_rng(3).integers(0, VOCAB, 12).astype(np.int32)
    wrong = TeacherPrompts(wrong.prompt_lengths_N, lengths, ids)
    with torch.no_grad():
        right_R = logprobs(hf(path), batch).numpy()
        wrong_R = logprobs(hf(path), replace(batch, teacher_prompts=wrong)).numpy()
    asked = replace(batch, contrast_prompts=wrong, teacher_logprobs=np.zeros(0, np.float32))
    told = replace(batch, teacher_prompts=None, teacher_logprobs=right_R, contrast_logprobs=wrong_R)
    teacher = TeacherConfig(model_path=path, load=None, weights="live" if live else "frozen")
    ours, elsewhere = Trainer(config_of(model_path, teacher)), Trainer(learner_config(model_path, loss=LOSS))
    expected = hf_gradients(elsewhere, step_batch(0, [told]))
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    assert_close(hf_gradients(ours, step_batch(0, [asked])), expected, 1e-5)
    assert_close(hf_gradients(ours, step_batch(0, [asked, EMPTY])), expected, 1e-5)
    mean = float((right_R - wrong_R).mean())
    assert ours.gradients(step_batch(0, [asked])).mean("contrast") == pytest.approx(mean, abs=1e-5)
    assert ours.step(step_batch(0, [asked])).contrast == pytest.approx(mean, abs=1e-5)


def test_without_a_contrast_nothing_is_reported(alone: Place, model_path: Path) -> None:
    plain = Trainer(learner_config(model_path, loss=LossConfig(loss="reverse_kl")))
    assert plain.step(step_batch(0, [micro_batch([9, 5]), EMPTY])).contrast is None
