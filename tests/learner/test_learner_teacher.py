"""A teacher in the learner: its forward, losses and gradients against transformers, and nowhere but in the learner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from full_fixtures import enumerated
from megatron.core.dist_checkpointing import load_tensors_metadata
from tiny_learner import (
    EMPTY,
    VOCAB,
    assert_close,
    hf_gradients,
    learner_config,
    micro_batch,
    split,
    step_batch,
    write_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from opd_async.config.losses import FULL_LOSSES, SAMPLED_LOSSES
from opd_async.learner import resume
from opd_async.learner import teacher as teacher_module
from opd_async.learner.config import LearnerConfig, LossConfig, ParallelConfig, TeacherConfig
from opd_async.learner.convert import hf_to_megatron
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import CheckpointError, LearnerError, ModelError
from opd_async.learner.hf.io import hf_weights
from opd_async.learner.opinion import opinion
from opd_async.learner.teacher import HostWeights, Teacher
from opd_async.learner.trainer import Trainer
from opd_async.transport.messages import AskTeacher
from opd_async.transport.step_batch import MicroBatch

BETA = 0.3


@pytest.fixture(scope="module")
def teacher(alone: Place, tmp_path_factory: pytest.TempPathFactory) -> TeacherConfig:
    """Deeper and wider than the student."""
    folder = tmp_path_factory.mktemp("teacher")
    hf = write_model(folder / "hf", "teacher")
    hf_to_megatron(hf, folder / "megatron", ParallelConfig())
    return TeacherConfig(model_path=hf, load=folder / "megatron")


def config_of(model_path: Path, teacher: TeacherConfig, loss: str, **changes: object) -> LearnerConfig:
    return learner_config(model_path, loss=LossConfig(loss=loss, jsd_beta=BETA), teacher=teacher, **changes)


def logits(model: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """float32[R, V] by transformers, one forward per sequence."""
    tables = []
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids = torch.from_numpy(batch.token_ids[start:end].astype("int64"))
        rows = [row - start for row in batch.rows.tolist() if start <= row < end]
        tables.append(model(ids[None]).logits[0][rows])
    return torch.cat(tables)


def unscored(batch: MicroBatch) -> MicroBatch:
    """As the intake sends it: nobody has scored these tokens."""
    return replace(batch, teacher_logprobs=np.zeros_like(batch.teacher_logprobs))


@pytest.mark.parametrize("loss", sorted(FULL_LOSSES - {"minillm_full"}))
def test_full_losses_and_gradients_agree_with_transformers(
    alone: Place, model_path: Path, teacher: TeacherConfig, loss: str
) -> None:
    batch = unscored(micro_batch([5, 23, 30]))
    batch.advantages[:] = 0.0
    student = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.no_grad():
        wanted = logits(AutoModelForCausalLM.from_pretrained(teacher.model_path, dtype=torch.float32), batch).double()
    rows = zip(logits(student, batch).double(), wanted, strict=True)
    expected = torch.stack([enumerated(loss, ours, theirs, BETA) for ours, theirs in rows]).mean()
    expected.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    trainer, step = Trainer(config_of(model_path, teacher, loss)), step_batch(0, [batch])
    found = trainer.gradients(step).sums["loss"] / step.loss_tokens
    assert found == pytest.approx(float(expected.detach()), abs=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-2
    assert_close(hf_gradients(trainer, step), gradients, 1e-5)


@pytest.mark.parametrize("loss", sorted(SAMPLED_LOSSES))
def test_sampled_losses_take_the_scores_of_the_forward(
    alone: Place, model_path: Path, teacher: TeacherConfig, loss: str
) -> None:
    """The same gradient as with a teacher elsewhere that has sent the scores of transformers."""
    batch = micro_batch([5, 23, 30])
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(teacher.model_path, dtype=torch.float32)
        table = logits(model, batch).log_softmax(-1)
    targets = torch.from_numpy(batch.token_ids[batch.rows + 1].astype("int64"))
    scored = replace(batch, teacher_logprobs=table.gather(1, targets[:, None])[:, 0].numpy())
    config = config_of(model_path, teacher, loss)
    elsewhere = Trainer(replace(config, teacher=None))
    ours, theirs = Trainer(config), step_batch(0, [scored])
    totals, expected = ours.gradients(step_batch(0, [unscored(batch)])), elsewhere.gradients(theirs)
    assert totals.sums["reverse_kl"] == pytest.approx(expected.sums["reverse_kl"], abs=1e-3)
    assert_close(hf_gradients(ours, step_batch(0, [unscored(batch)])), hf_gradients(elsewhere, theirs), 1e-5)


@pytest.mark.parametrize("loss", sorted({*FULL_LOSSES, "reverse_kl"}))
def test_chunks_and_micro_batches_change_nothing(
    alone: Place, model_path: Path, teacher: TeacherConfig, loss: str
) -> None:
    packed = unscored(micro_batch([9, 31, 14, 30, 22, 5, 13, 40]))
    config = config_of(model_path, teacher, loss, logprob_chunk_rows=1000)
    whole = hf_gradients(Trainer(config), step_batch(0, [packed]))
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3
    trainer = Trainer(replace(config, logprob_chunk_rows=1, teacher=replace(teacher, offload=True)))
    assert_close(hf_gradients(trainer, step_batch(0, [*split(packed), EMPTY])), whole, 1e-6)


@pytest.mark.parametrize(("asked", "chunk_rows"), [(0, 1000), (4, 1), (1000, 3)])
def test_it_says_what_transformers_says_of_texts(
    alone: Place, model_path: Path, teacher: TeacherConfig, asked: int, chunk_rows: int
) -> None:
    """Of every response token, in the order of the texts, whatever is forwarded together; a list may have every id."""
    batch = micro_batch([9, 31, 14, 30, 22])
    prompts = [2, 9, 5, 29, 1]
    starts, ends = batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()
    rows = [np.arange(s + p - 1, e - 1) for s, e, p in zip(starts, ends, prompts, strict=True)]
    batch = replace(batch, rows=np.concatenate(rows).astype(np.int32))
    with torch.no_grad():
        table = logits(AutoModelForCausalLM.from_pretrained(teacher.model_path, dtype=torch.float32), batch)
    table = table.log_softmax(-1)
    trainer = Trainer(learner_config(model_path, teacher=teacher, logprob_chunk_rows=chunk_rows))
    lengths = np.diff(batch.cu_seqlens).astype(np.int32)
    found = opinion(trainer, AskTeacher(batch.token_ids, lengths, np.array(prompts, np.int32), topk=asked), 40)
    targets = torch.from_numpy(batch.token_ids[batch.rows + 1].astype("int64"))
    np.testing.assert_allclose(found.logprobs, table.gather(1, targets[:, None])[:, 0], atol=1e-5)
    assert (found.topk is None) == (asked == 0)
    if found.topk is not None:
        best = table.topk(min(asked, VOCAB))
        np.testing.assert_allclose(found.topk.logprobs, best.values, atol=1e-5)
        ids = torch.from_numpy(found.topk.ids.astype("int64"))  # of nearly equal logprobs, any order is right
        np.testing.assert_allclose(table.gather(1, ids), best.values, atol=1e-5)
        assert found.topk.problem() is None


def test_weights_that_move_are_not_asked(alone: Place, model_path: Path) -> None:
    live = TeacherConfig(model_path=model_path, load=None, weights="live")
    one = np.array([3], np.int32)
    asked = AskTeacher(np.array([1, 2, 3], np.int32), one, one - 1, topk=0)
    for teacher in (None, live, replace(live, weights="ema")):
        with pytest.raises(LearnerError, match="none whose weights stay as they are"):
            opinion(Trainer(learner_config(model_path, teacher=teacher)), asked, 40)


def test_the_teacher_is_in_no_export_and_in_no_checkpoint(
    alone: Place, model_path: Path, teacher: TeacherConfig, tmp_path: Path
) -> None:
    trainer = Trainer(config_of(model_path, teacher, "forward_kl_full"))
    alone_with = Trainer(learner_config(model_path))
    assert_close(dict(hf_weights(trainer.model)), dict(hf_weights(alone_with.model)), 0.0)
    assert trainer.teacher is not None
    before = [parameter.clone() for parameter in trainer.teacher.model.parameters()]
    trainer.step(step_batch(0, [unscored(micro_batch([9, 14]))]))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.teacher.model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in trainer.teacher.model.parameters())
    resume.save(trainer, tmp_path / "learner")
    resume.load(alone_with, tmp_path / "learner")
    assert alone_with.version == 1
    assert_close(dict(hf_weights(trainer.model)), dict(hf_weights(alone_with.model)), 0.0)
    resume.save(alone_with, tmp_path / "without")
    ours, theirs = (
        {name: tensor.global_shape for name, tensor in load_tensors_metadata(str(tmp_path / folder)).items()}
        for folder in ("learner", "without")
    )
    assert ours == theirs


def test_weights_leave_the_device_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy plays the GPU: inside the block weights are copies, outside they are the memory that they were before."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    cpu, expected = torch.device("cpu"), [parameter.data_ptr() for parameter in model.parameters()]
    with HostWeights(model, cpu).on_device():  # nothing to move
        assert [parameter.data_ptr() for parameter in model.parameters()] == expected
    monkeypatch.setattr(teacher_module, "_on_device", lambda host, _device: host.clone())
    host = HostWeights(model, cpu)
    with host.on_device():
        assert not {parameter.data_ptr() for parameter in model.parameters()} & set(expected)
        kept = model[1].weight.detach()
    assert [parameter.data_ptr() for parameter in model.parameters()] == expected
    assert torch.equal(kept, model[1].weight)  # what a step still needs of the device's copy lives on
    with pytest.raises(RuntimeError, match="mid-way"), host.on_device():
        raise RuntimeError("mid-way")
    assert [parameter.data_ptr() for parameter in model.parameters()] == expected


def test_what_cannot_be_the_teacher_is_refused(
    alone: Place, model_path: Path, teacher: TeacherConfig, tmp_path: Path
) -> None:
    config = learner_config(model_path)
    with pytest.raises(CheckpointError, match="Qwen3ForCausalLM of 2 layers"):
        Trainer(replace(config, teacher=replace(teacher, model_path=model_path)))
    with pytest.raises(CheckpointError, match="nowhere"):
        Trainer(replace(config, teacher=replace(teacher, load=tmp_path / "nowhere")))
    with pytest.raises(ModelError, match="a vocabulary of 33, but ids up to 33 are sampled"):
        Teacher(config, teacher, 34)


@pytest.mark.parametrize("rows", [VOCAB + 64, VOCAB - 4])
@pytest.mark.parametrize("loss", ["forward_kl_full", "jsd_full", "reverse_kl_full", "reverse_kl"])
def test_tables_of_other_sizes(alone: Place, model_path: Path, tmp_path: Path, loss: str, rows: int) -> None:
    """A teacher with more rows and with fewer, against transformers: student's logits are cut to the ids of both."""
    folder, shared = write_model(tmp_path, "teacher", rows=rows), min(rows, VOCAB)
    batch = unscored(micro_batch([5, 23, 30]))
    batch.token_ids[:] %= shared
    batch.advantages[:] = 0.0
    student = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.no_grad():
        wanted = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), batch).double()
    ours = logits(student, batch).double()[:, :shared]
    targets = torch.from_numpy(batch.token_ids[batch.rows + 1].astype("int64"))[:, None]
    own, log_q = ours.log_softmax(-1).gather(1, targets)[:, 0], wanted.log_softmax(-1).gather(1, targets)[:, 0]
    ratio = (own - torch.from_numpy(batch.behaviour_logprobs)).exp()
    if loss == "reverse_kl":
        expected = -(ratio * (log_q - own.detach())).mean()
    else:
        expected = torch.stack([enumerated(loss, s, t, BETA) for s, t in zip(ours, wanted, strict=True)]).mean()
    expected.backward()
    config = learner_config(
        model_path,
        loss=LossConfig(loss=loss, jsd_beta=BETA, clip_ratio=None),
        teacher=TeacherConfig(model_path=folder, load=None),
        vocab=shared,
    )
    trainer, step = Trainer(config), step_batch(0, [batch])
    totals = trainer.gradients(step)
    assert totals.sums["loss"] / totals.tokens == pytest.approx(float(expected.detach()), abs=1e-5)
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 1e-3
    assert_close(hf_gradients(trainer, step), gradients, 1e-5)
    exact = (ratio * (own - log_q)).mean()
    if loss != "reverse_kl_full":  # that reports the exact one
        assert totals.sums["reverse_kl"] / totals.tokens == pytest.approx(float(exact.detach()), abs=1e-5)
