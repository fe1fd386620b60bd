"""A teacher in the learner that reads other prompts than the student: losses and gradients against transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from full_fixtures import enumerated
from tiny_learner import (
    EMPTY,
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
from opd_async.transport.step_batch import MicroBatch

BETA = 0.3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    """Another model than the student, as a Hugging Face folder."""
    return TeacherConfig(model_path=write_model(tmp_path_factory.mktemp("teacher"), "teacher"), load=None)


def config_of(model_path: Path, teacher: TeacherConfig, loss: str, **changes: object) -> LearnerConfig:
    return learner_config(model_path, loss=LossConfig(loss=loss, jsd_beta=BETA), teacher=teacher, **changes)


def hf(path: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model


def logits(model: torch.nn.Module, batch: MicroBatch, *, as_teacher: bool) -> Tensor:
    """float32[R, V] by transformers, one forward per sequence, behind the student's prompts or the teacher's."""
    tables = []
    bounds = batch.cu_seqlens.tolist()
    for index, (theirs, moved) in enumerate(sequences_of_teacher(batch)):
        start, end = bounds[index], bounds[index + 1]
        rows = np.array([row - start for row in batch.rows.tolist() if start <= row < end])
        ids = np.array(theirs if as_teacher else batch.token_ids[start:end], np.int64)
        tables.append(model(torch.from_numpy(ids)[None]).logits[0][rows + (moved if as_teacher else 0)])
    return torch.cat(tables)


def informed(lengths: list[int], seed: int = 0) -> MicroBatch:
    """Rows that only a divergence trains, and a teacher that reads other prompts."""
    batch = read_differently(micro_batch(lengths, seed=seed), seed=seed)
    return replace(batch, teacher_logprobs=np.zeros_like(batch.rows, np.float32), advantages=batch.advantages * 0.0)


@pytest.mark.parametrize("loss", ["forward_kl_full", "reverse_kl_full", "jsd_full"])
def test_gradients_are_those_of_two_prompts_in_plain_autograd(
    alone: Place, model_path: Path, teacher: TeacherConfig, loss: str
) -> None:
    batch = informed([5, 23, 30, 11])
    student = hf(model_path)
    with torch.no_grad():
        wanted = logits(hf(teacher.model_path), batch, as_teacher=True).double()
    rows = zip(logits(student, batch, as_teacher=False).double(), wanted, strict=True)
    expected = torch.stack([enumerated(loss, ours, theirs, BETA) for ours, theirs in rows]).mean()
    expected.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    trainer, step = Trainer(config_of(model_path, teacher, loss)), step_batch(0, [batch])
    assert trainer.gradients(step).sums["loss"] / step.loss_tokens == pytest.approx(float(expected.detach()), abs=1e-5)
    assert_close(hf_gradients(trainer, step), gradients, 1e-5)
    plain = hf_gradients(trainer, step_batch(0, [replace(batch, teacher_prompts=None)]))
    assert max(float((plain[name] - gradients[name]).abs().max()) for name in plain) > 1e-3, "the prompts matter"
    # one micro-batch and four, whole and in two parts
    assert_close(hf_gradients(trainer, step_batch(0, [*split(batch), EMPTY])), gradients, 1e-5)
    first, *rest = split(batch)
    trainer.accumulate(replace(step_batch(0, [first]), last=False))
    assert_close(hf_gradients(trainer, replace(step_batch(0, rest), part=1)), gradients, 1e-5)


def test_the_sampled_token_is_scored_behind_the_teachers_prompt(
    alone: Place, model_path: Path, teacher: TeacherConfig
) -> None:
    """The same gradient as with a teacher elsewhere that has sent the scores of transformers."""
    batch = informed([5, 23, 30, 11])
    with torch.no_grad():
        table = logits(hf(teacher.model_path), batch, as_teacher=True).log_softmax(-1)
    targets = torch.from_numpy(batch.token_ids[batch.rows + 1].astype("int64"))
    scored = replace(batch, teacher_logprobs=table.gather(1, targets[:, None])[:, 0].numpy())
    config = config_of(model_path, teacher, "reverse_kl")
    ours, elsewhere = Trainer(config), Trainer(replace(config, teacher=None))
    expected = hf_gradients(elsewhere, step_batch(0, [scored]))
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    assert_close(hf_gradients(ours, step_batch(0, [batch])), expected, 1e-5)
