"""Teachers in the learner that read other prompts than the student, the student itself among them: losses and gradients
against transformers, slime's loss, what a checkpoint carries."""

from __future__ import annotations

import math
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
    take,
    write_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from opd_async.learner import resume
from opd_async.learner.average import MovingTeacher
from opd_async.learner.config import LearnerConfig, LossConfig, TeacherConfig
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import CheckpointError
from opd_async.learner.hf.io import hf_weights
from opd_async.learner.losses.divergences import Cells, jsd_topk
from opd_async.learner.losses.objective import bounded
from opd_async.learner.metrics import Totals
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


# --- the student as its own teacher -----------------------------------------------------------------------------------


def itself(model_path: Path, weights: str, **changes: object) -> LearnerConfig:
    own = TeacherConfig(model_path=model_path, load=None, weights=weights, decay=0.75)  # type: ignore[arg-type]
    return learner_config(model_path, loss=LossConfig(loss="jsd_full", jsd_beta=BETA), teacher=own, **changes)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """The student's weights now, by their Hugging Face names."""
    return {name: tensor.clone() for name, tensor in hf_weights(trainer.model)}


def gradient_of(
    student: dict[str, Tensor], teacher: dict[str, Tensor], path: Path, batch: MicroBatch
) -> dict[str, Tensor]:
    """By transformers, of two models that read the batch each in its way."""
    ours, theirs = hf(path), hf(path)
    ours.load_state_dict(student, strict=False)
    theirs.load_state_dict(teacher, strict=False)
    with torch.no_grad():
        wanted = logits(theirs, batch, as_teacher=True).double()
    rows = zip(logits(ours, batch, as_teacher=False).double(), wanted, strict=True)
    torch.stack([enumerated("jsd_full", a, b, BETA) for a, b in rows]).mean().backward()
    return {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weights", ["frozen", "live", "ema"])
def test_the_student_teaches_itself_with_the_weights_that_were_asked_for(
    alone: Place, model_path: Path, weights: str
) -> None:
    trainer = Trainer(itself(model_path, weights))
    first = average = weights_of(trainer)
    for version in range(3):
        batch, now = informed([5, 23, 30, 11], seed=version), weights_of(trainer)
        teaching = {"frozen": first, "live": now, "ema": average}[weights]
        found = hf_gradients(trainer, step_batch(version, [batch]))
        expected = gradient_of(now, teaching, model_path, batch)
        assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
        assert_close(found, expected, 1e-5)
        trainer.step(step_batch(version, [batch]))
        average = {name: 0.75 * average[name] + 0.25 * new for name, new in weights_of(trainer).items()}
    moved = max(float((new - first[name]).abs().max()) for name, new in weights_of(trainer).items())
    assert moved > 1e-3, "else the three would be the same"


def test_a_live_teacher_is_no_second_model(alone: Place, model_path: Path, tmp_path: Path) -> None:
    trainer = Trainer(itself(model_path, "live"))
    assert trainer.teacher is not None and not hasattr(trainer.teacher, "model")
    trainer.step(step_batch(0, [informed([9, 14])]))
    resume.save(trainer, tmp_path / "live")
    resume.load(Trainer(learner_config(model_path)), tmp_path / "live")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_average_goes_on_from_a_checkpoint(alone: Place, model_path: Path, tmp_path: Path, dtype: str) -> None:
    trainer = Trainer(itself(model_path, "ema", dtype=dtype))
    for version in range(2):
        trainer.step(step_batch(version, [informed([9, 14, 30], seed=version)]))
    resume.save(trainer, tmp_path / "run")
    resumed = Trainer(itself(model_path, "ema", dtype=dtype))
    resume.load(resumed, tmp_path / "run")

    def average(of: Trainer) -> list[Tensor]:
        assert isinstance(of.teacher, MovingTeacher)
        with of.teacher.in_float32() as model:
            return [parameter.data.clone() for parameter in model.parameters()]

    student = [parameter.data.float() for parameter in trainer.model.parameters()]
    assert all(tensor.dtype is torch.float32 for tensor in average(trainer))
    assert any(not torch.equal(a, s) for a, s in zip(average(trainer), student, strict=True))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(average(trainer), average(resumed), strict=True))
        batch = step_batch(trainer.version, [informed([9, 14, 30], seed=trainer.version)])
        ours, theirs = trainer.step(batch), resumed.step(batch)
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
    resume.save(Trainer(itself(model_path, "frozen", dtype=dtype)), tmp_path / "frozen")
    with pytest.raises(CheckpointError, match=r"has no average that teaches: .* opd\.self\.weights"):
        resume.load(resumed, tmp_path / "frozen")


def test_an_average_in_low_precision_takes_in_steps_that_its_own_precision_would_lose(
    alone: Place, model_path: Path
) -> None:
    config = itself(model_path, "ema", dtype="bfloat16")
    assert config.teacher is not None
    trainer = Trainer(replace(config, teacher=replace(config.teacher, decay=0.999)))
    assert isinstance(trainer.teacher, MovingTeacher)
    with torch.no_grad():
        student = next(trainer.model.parameters())
        student.add_(0.25)
    before = next(trainer.teacher.model.parameters()).data.float().clone()
    for _ in range(1000):
        trainer.teacher.follow(trainer.model)
    moved = (next(trainer.teacher.model.parameters()).data.float() - before).mean()
    assert float(moved) == pytest.approx(0.25 * (1.0 - 0.999**1000), abs=2e-3)


# --- slime's loss, and what is reported -------------------------------------------------------------------------------


def slimes(student_RV: Tensor, teacher_RV: Tensor, beta: float, clip: float) -> Tensor:
    """A token's divergence as slime's self-distillation has it, from logits, bounded: float[R]."""
    p, q = student_RV.log_softmax(-1), teacher_RV.log_softmax(-1)
    if beta == 0.0:
        terms = q.exp() * (q - p)
    elif beta == 1.0:
        terms = p.exp() * (p - q)
    else:
        m = torch.logaddexp(p + math.log(1.0 - beta), q + math.log(beta))
        terms = beta * q.exp() * (q - m) + (1.0 - beta) * p.exp() * (p - m)
    return terms.sum(-1).clamp(max=clip)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_slimes_loss_on_the_same_numbers(alone: Place, model_path: Path, beta: float) -> None:
    """Its mean is over responses, each the mean over its tokens: `learner.loss_mean: responses`."""
    batch = informed([5, 23, 30, 11])
    counts = np.bincount(np.searchsorted(batch.cu_seqlens, batch.rows, side="right") - 1)
    weights = np.repeat(len(batch.rows) / (len(counts) * counts), counts).astype(np.float32)
    batch = replace(batch, weights=weights)
    loss = {0.0: "forward_kl_full", 1.0: "reverse_kl_full"}.get(beta, "jsd_full")
    student = hf(model_path)
    with torch.no_grad():
        theirs = logits(hf(model_path), batch, as_teacher=True).double()
    ours = logits(student, batch, as_teacher=False).double()
    clip = float(slimes(ours.detach(), theirs, beta, math.inf).sort().values[-12:-10].mean())  # ten are beyond it
    tokens_R = slimes(ours, theirs, beta, clip)
    expected = torch.stack([part.mean() for part in tokens_R.split(counts.tolist())]).mean()
    expected.backward()
    share = float((tokens_R == clip).double().mean())
    assert 0.05 < share < 0.95, "the bound must act on some tokens"

    config = itself(model_path, "frozen")
    config = replace(config, loss=LossConfig(loss=loss, jsd_beta=beta or 0.5, divergence_clip=clip))
    trainer, step = Trainer(config), step_batch(0, [batch])
    totals = trainer.gradients(step)
    assert totals.sums["loss"] / step.loss_tokens == pytest.approx(float(expected.detach()), abs=1e-6)
    assert totals.mean("divergence_clipped") == pytest.approx(share)
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert_close(hf_gradients(trainer, step), gradients, 1e-5)


def test_a_bound_on_a_divergence_of_the_topk() -> None:
    logits_RK = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    student = logits_RK.log_softmax(-1)[:, :3].requires_grad_()
    tail = torch.log1p(-student.detach().exp().sum(-1))
    teacher = (2.0 * logits_RK.roll(1, 0)).log_softmax(-1)[:, :3]
    config = LossConfig(loss="jsd_topk", divergence_clip=0.1)
    plain_R = jsd_topk(Cells(student, tail, teacher), config)
    found_R, said = bounded(plain_R, config)
    assert torch.equal(found_R, plain_R.clamp(max=0.1))
    beyond = plain_R > 0.1
    assert 0 < int(beyond.sum()) < 40 and said["divergence_clipped"].tolist() == [int(beyond.sum()), 40]
    found_R.sum().backward()
    assert student.grad is not None
    assert not student.grad[beyond].any() and student.grad[~beyond].abs().sum(-1).min() > 0.0


def test_what_is_reported_of_a_teacher_that_knows_more(alone: Place, model_path: Path, teacher: TeacherConfig) -> None:
    batch = informed([5, 23, 30, 11])
    config = config_of(model_path, teacher, "jsd_full", plain_kl_every=2, frequent_tokens=4)
    trainer = Trainer(config)
    totals = trainer.gradients(step_batch(0, [batch, EMPTY]))
    with torch.no_grad():
        ours = logits(hf(model_path), batch, as_teacher=False).double()
        plain, read = (logits(hf(teacher.model_path), batch, as_teacher=side).double() for side in (False, True))
    targets = torch.from_numpy(batch.token_ids[batch.rows + 1].astype("int64"))
    p, q = (table.log_softmax(-1).gather(1, targets[:, None])[:, 0] for table in (ours, plain))
    rho = (p - torch.from_numpy(batch.behaviour_logprobs)).exp()
    assert totals.mean("plain_kl") == pytest.approx(float((rho * (p - q)).mean()), abs=1e-4)
    signal = torch.stack([enumerated("jsd_full", a, b, BETA) for a, b in zip(ours, read, strict=True)])
    counts = torch.bincount(targets, minlength=33)
    frequent = torch.argsort(-counts, stable=True)[:4]
    share = float(signal[torch.isin(targets, frequent)].sum() / signal.sum())
    assert 0.05 < share < 0.95
    assert totals.mean("frequent_signal") == pytest.approx(share, abs=1e-5)
    check_entropy(totals, ours)
    trainer.step(step_batch(0, [batch]))
    assert trainer.step(step_batch(1, [batch])).plain_kl is None
    assert trainer.step(step_batch(2, [batch])).plain_kl is not None


def test_the_share_of_frequent_tokens_in_a_sampled_signal(alone: Place, model_path: Path) -> None:
    """The signal is log q - log p of the sampled token, as a teacher's engine scored it."""
    batch = micro_batch([5, 23, 30, 11])
    trainer = Trainer(learner_config(model_path, loss=LossConfig(loss="reverse_kl"), frequent_tokens=4))
    with torch.no_grad():
        table = logits(hf(model_path), batch, as_teacher=False).double().log_softmax(-1)
    targets = torch.from_numpy(batch.token_ids[batch.rows + 1].astype("int64"))
    signal = (torch.from_numpy(batch.teacher_logprobs).double() - table.gather(1, targets[:, None])[:, 0]).abs()
    frequent = torch.argsort(-torch.bincount(targets, minlength=33), stable=True)[:4]
    share = float(signal[torch.isin(targets, frequent)].sum() / signal.sum())
    totals = trainer.gradients(step_batch(0, [batch]))
    assert totals.mean("frequent_signal") == pytest.approx(share, abs=1e-5)
    check_entropy(totals, table)


def check_entropy(totals: Totals, logits_RV: torch.Tensor) -> None:
    """Its mean, and that of the fifth of the rows where it is highest."""
    logprobs_RV = logits_RV.log_softmax(-1)
    entropy_R = -(logprobs_RV.exp() * logprobs_RV).sum(-1)
    assert totals.mean("entropy") == pytest.approx(float(entropy_R.mean()), abs=1e-5)
    highest = entropy_R.sort(descending=True).values[: len(entropy_R) // 5]
    assert totals.mean("fork_entropy") == pytest.approx(float(highest.mean()), abs=1e-5)
    assert float(highest.mean()) > 1.01 * float(entropy_R.mean())


def cut(batch: MicroBatch, at: int) -> list[MicroBatch]:
    """Each sequence as two steps' segments: up to its `at`-th row, and from there on, with all before it as context."""
    found = []
    for one in split(batch):
        first, last = np.arange(len(one.rows)) < at, np.arange(len(one.rows)) >= at
        end = int(one.rows[first][-1]) + 2
        for rows, length in ((first, end), (last, len(one.token_ids))):
            part = take(one, rows, 0, length)
            found.append(replace(part, teacher_prompts=one.teacher_prompts, weights=None))
    return [one for one in found if len(one.rows)]


def test_responses_that_are_cut_have_the_gradient_of_whole_ones(
    alone: Place, model_path: Path, teacher: TeacherConfig
) -> None:
    batch = informed([5, 23, 30, 11])
    trainer = Trainer(config_of(model_path, teacher, "jsd_full"))
    whole = hf_gradients(trainer, step_batch(0, [batch]))
    parts = cut(batch, 4)
    assert sum(len(part.rows) for part in parts) == len(batch.rows) and len(parts) == 7
    assert_close(hf_gradients(trainer, step_batch(0, parts)), whole, 1e-6)
