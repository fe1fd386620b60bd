"""One step: independent of packing and micro-batching, exact across cuts, refusing what cannot be right."""

from __future__ import annotations

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
    split,
    step_batch,
    take,
    write_model,
)

from opd_async.config.losses import TOPK_LOSSES
from opd_async.learner.config import LossConfig, OptimConfig, ParallelConfig, TeacherConfig
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import LearnerError, ModelError
from opd_async.learner.model.architecture import read_shape
from opd_async.learner.model.decoder import build_model
from opd_async.learner.optimizer import learning_rate
from opd_async.learner.trainer import Trainer
from opd_async.transport.step_batch import MicroBatch


@pytest.fixture
def trainer(alone: Place, model_path: Path) -> Trainer:
    return Trainer(learner_config(model_path))


def test_packing_and_micro_batching_change_nothing(trainer: Trainer) -> None:
    packed = micro_batch([9, 31, 14, 30, 22, 5, 13, 40])
    parts = split(packed)
    assert len(parts) == 8
    together = torch.cat(trainer.logprobs([packed]))
    torch.testing.assert_close(torch.cat(trainer.logprobs(parts)), together, rtol=0.0, atol=1e-5)
    whole = hf_gradients(trainer, step_batch(0, [packed]))
    assert_close(hf_gradients(trainer, step_batch(0, parts)), whole, 1e-6)
    assert_close(hf_gradients(trainer, step_batch(0, [*parts, EMPTY])), whole, 1e-6)


@pytest.mark.parametrize("loss", sorted(TOPK_LOSSES))
def test_micro_batching_changes_nothing_for_losses_on_the_top_k(alone: Place, model_path: Path, loss: str) -> None:
    packed = micro_batch([9, 31, 14, 30, 22, 5, 13, 40], k=4)
    parts = split(packed)
    config = learner_config(model_path, loss=LossConfig(loss=loss), logprob_chunk_rows=1000)
    whole = hf_gradients(Trainer(config), step_batch(0, [packed]))
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3
    trainer = Trainer(replace(config, logprob_chunk_rows=1))
    assert_close(hf_gradients(trainer, step_batch(0, [*parts, EMPTY])), whole, 1e-6)


def test_the_shares_of_the_top_k_are_reported(alone: Place, model_path: Path) -> None:
    batch = micro_batch([9, 31], k=VOCAB - 1)
    assert batch.topk is not None
    metrics = Trainer(learner_config(model_path, loss=LossConfig(loss="forward_kl_topk"))).step(step_batch(0, [batch]))
    assert metrics.teacher_support == pytest.approx(float(np.exp(batch.topk.logprobs).sum(1).mean()), rel=1e-5)
    assert 0.9 < metrics.known()["student_support"] < 1.0


def test_a_loss_on_the_top_k_needs_one(alone: Place, model_path: Path) -> None:
    trainer = Trainer(learner_config(model_path, loss=LossConfig(loss="jsd_topk")))
    with pytest.raises(LearnerError, match="jsd_topk needs the teacher's top-k, and the batch has none"):
        trainer.step(step_batch(0, [micro_batch([9, 14])]))


def test_a_response_trained_in_cuts_has_the_gradient_of_the_whole(trainer: Trainer) -> None:
    whole = micro_batch([40], prompt=6)
    cuts: list[MicroBatch] = []
    for start, end in ((0, 5), (5, 20), (20, 34)):
        rows = np.zeros(len(whole.rows), dtype=bool)
        rows[start:end] = True
        # a cut carries the prefix up to its last trained token, and nothing after
        cuts.append(take(whole, rows, 0, int(whole.rows[end - 1]) + 2))
    assert [len(cut.token_ids) for cut in cuts] == [11, 26, 40]
    together = hf_gradients(trainer, step_batch(0, [whole]))
    summed: dict[str, torch.Tensor] = {}
    for cut in cuts:
        for name, grad in hf_gradients(trainer, step_batch(0, [cut])).items():
            share = grad * len(cut.rows) / len(whole.rows)
            summed[name] = summed.get(name, torch.zeros_like(grad)) + share
    assert_close(summed, together, 1e-5)


def test_recomputation_changes_nothing(alone: Place, model_path: Path) -> None:
    batch = step_batch(0, [micro_batch([9, 31, 14])])
    plain = hf_gradients(Trainer(learner_config(model_path)), batch)
    for recompute in (True, "selective"):
        assert_close(hf_gradients(Trainer(learner_config(model_path, recompute=recompute)), batch), plain, 1e-6)


def test_a_step_reports_what_it_did_and_learns(trainer: Trainer) -> None:
    batch = micro_batch([20] * 8)
    (own,) = trainer.logprobs([batch])
    # on-policy, with a teacher that likes every sampled token better
    batch = replace(
        batch, behaviour_logprobs=own.numpy(), teacher_logprobs=own.numpy() + 1.0, advantages=own.numpy() * 0
    )
    first = trainer.step(step_batch(0, [batch]))
    assert (first.version, first.tokens) == (1, len(batch.rows))
    assert first.reverse_kl == pytest.approx(-1.0, abs=1e-5)
    assert first.k3 == pytest.approx(np.e - 2.0, abs=1e-4)
    assert first.ratio_mean == pytest.approx(1.0, abs=1e-5)
    assert first.known()["ratio_std"] < 1e-4
    assert first.staleness_mean == pytest.approx(batch.staleness.mean())
    assert first.staleness_max == batch.staleness.max()
    assert first.known()["grad_norm"] > 0.0
    assert not {"student_support", "entropy", "reference_kl", "value_loss"} & set(first.known())
    assert first.learning_rate == pytest.approx(1.5e-3)
    second = trainer.step(step_batch(1, [batch])).known()
    assert second["k3"] < first.known()["k3"]
    assert second["ratio_mean"] > 1.0
    assert second["clipped_share"] > 0.0


def test_bfloat16_weights_train_with_float32_masters(alone: Place, model_path: Path) -> None:
    batch = micro_batch([20] * 4)
    half = Trainer(learner_config(model_path, dtype="bfloat16"))
    full = Trainer(learner_config(model_path))
    for version in range(3):
        ours, theirs = (trainer.step(step_batch(version, [batch])) for trainer in (half, full))
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.2)
    assert next(half.model.parameters()).dtype is torch.bfloat16
    masters = [p for group in half.optimizer.param_groups for p in group["params"]]
    assert all(master.dtype is torch.float32 for master in masters)


def test_a_batch_that_contradicts_itself_is_refused_before_any_weight_changes(trainer: Trainer) -> None:
    batch = micro_batch([9, 14])
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(LearnerError, match="weight version 3 reached a learner at 0"):
        trainer.step(step_batch(3, [batch]))
    with pytest.raises(LearnerError, match="19 rows for weight version 0, but the batch says 20 loss tokens"):
        trainer.step(step_batch(0, [batch], loss_tokens=20))
    broken = replace(batch, teacher_logprobs=np.full_like(batch.teacher_logprobs, np.nan))
    with pytest.raises(LearnerError, match="loss at weight version 0 is nan"):
        trainer.step(step_batch(0, [broken]))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.version == 0
    trainer.step(step_batch(0, [batch]))


def test_learning_rate_schedule() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, total_steps=14, decay="linear", min_lr_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(16)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.55)
    assert rates[14] == rates[15] == pytest.approx(0.1)
    assert learning_rate(9, replace(config, decay="cosine")) == pytest.approx(0.55)
    assert learning_rate(6, replace(config, decay="cosine")) > learning_rate(6, config)
    assert learning_rate(100, replace(config, decay="constant")) == 1.0


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tensor=4), "2 KV heads do not divide"),
        (ParallelConfig(tensor=3), "4 attention heads do not divide"),
        (ParallelConfig(pipeline=4), "2 layers do not divide"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(model_path: Path, parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(read_shape(model_path), learner_config(model_path, parallel=parallel))


def test_a_gradient_that_is_not_finite_is_refused(alone: Place, tmp_path: Path) -> None:
    trainer = Trainer(learner_config(write_model(tmp_path, "llama")))
    batch = step_batch(0, [micro_batch([9, 14])])
    weights = dict(trainer.model.named_parameters())
    with torch.no_grad():  # the same logits and loss, but a gradient of the LM head whose square overflows
        weights["decoder.final_layernorm.weight"].mul_(1e25)
        weights["output_layer.weight"].mul_(1e-25)
    with pytest.raises(LearnerError, match="gradient at weight version 0 has norm inf"):
        trainer.step(batch)
    assert trainer.version == 0


def test_without_a_teacher_only_the_advantages_count(trainer: Trainer) -> None:
    """No scores at all give the gradient of scores that are the student's own."""
    batch = micro_batch([9, 31, 14])
    own = torch.cat(trainer.logprobs([batch])).numpy()
    unscored = replace(batch, teacher_logprobs=np.zeros(0, np.float32))
    found = hf_gradients(trainer, step_batch(0, [unscored, EMPTY]))
    assert_close(found, hf_gradients(trainer, step_batch(0, [replace(batch, teacher_logprobs=own)])), 1e-6)
    assert max(float(gradient.abs().max()) for gradient in found.values()) > 1e-3
    totals = trainer.gradients(step_batch(0, [unscored]))
    assert totals.sums["reverse_kl"] == totals.sums["k3"] == 0.0
    silent = replace(unscored, advantages=np.zeros_like(batch.advantages))
    nothing = hf_gradients(trainer, step_batch(0, [silent]))
    assert max(float(gradient.abs().max()) for gradient in nothing.values()) == 0.0


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(ratio="sequence", clip_ratio=0.05, clip_high=0.1, entropy_coef=0.1),
        LossConfig(ratio="truncated", clip_ratio=1.0, clip_high=0.3),
        LossConfig(dual_clip=1.5),
    ],
    ids=["gspo", "cispo", "dual clip"],
)
def test_micro_batching_changes_nothing_for_any_form_of_the_ratio(
    alone: Place, model_path: Path, loss: LossConfig
) -> None:
    packed = micro_batch([9, 31, 14, 22, 5])
    config = learner_config(model_path, loss=loss, logprob_chunk_rows=1000)
    whole = hf_gradients(Trainer(config), step_batch(0, [packed]))
    token = hf_gradients(Trainer(replace(config, loss=LossConfig())), step_batch(0, [packed]))
    assert max(float((whole[name] - token[name]).abs().max()) for name in whole) > 1e-4
    trainer = Trainer(replace(config, logprob_chunk_rows=1))
    assert_close(hf_gradients(trainer, step_batch(0, [*split(packed), EMPTY])), whole, 1e-6)


def test_the_entropy_bonus_is_reported_and_pulls_towards_it(alone: Place, model_path: Path) -> None:
    batch = micro_batch([9, 31])
    silent = replace(batch, advantages=np.zeros_like(batch.advantages), teacher_logprobs=np.zeros(0, np.float32))
    loss = LossConfig(entropy_coef=1.0)
    trainer = Trainer(learner_config(model_path, loss=loss, optim=OptimConfig(lr=3e-3, total_steps=10)))
    entropies = [trainer.step(step_batch(version, [silent])).known()["entropy"] for version in range(4)]
    assert entropies == sorted(entropies) and 0.0 < entropies[0] < entropies[-1] <= np.log(VOCAB)


@pytest.mark.parametrize(
    "loss", [LossConfig(entropy_coef=0.1), LossConfig(loss="jsd_topk"), LossConfig(ratio="sequence")]
)
def test_weights_make_a_mean_over_responses(alone: Place, model_path: Path, loss: LossConfig) -> None:
    trainer = Trainer(learner_config(model_path, loss=loss))
    batch = micro_batch([9, 31, 14], k=4)
    parts = split(batch)
    each = [hf_gradients(trainer, step_batch(0, [part])) for part in parts]  # every one a mean over its own tokens
    rows, counts = len(batch.rows), [len(part.rows) for part in parts]
    weights = np.concatenate([np.full(count, rows / (3 * count), np.float32) for count in counts])
    found = hf_gradients(trainer, step_batch(0, [replace(batch, weights=weights), EMPTY]))
    assert_close(found, {name: sum(one[name] for one in each) / 3 for name in found}, 1e-6)


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd_topk"])
def test_a_reference_pulls_the_student_back(alone: Place, model_path: Path, loss: str) -> None:
    """What the student began as says nothing at first; once the student has moved, it is where it is drawn to."""
    optim = OptimConfig(lr=3e-3, total_steps=10)
    config = learner_config(model_path, optim=optim, loss=LossConfig(loss=loss, reference_kl_coef=2.0, clip_ratio=None))
    trainer = Trainer(replace(config, reference=TeacherConfig(model_path=model_path, load=None, offload=True)))
    batch = micro_batch([9, 31, 14], k=4)
    alone_ = hf_gradients(Trainer(replace(config, loss=LossConfig(loss=loss, clip_ratio=None))), step_batch(0, [batch]))
    assert_close(hf_gradients(trainer, step_batch(0, [batch])), alone_, 1e-6)
    assert abs(trainer.step(step_batch(0, [batch])).known()["reference_kl"]) < 1e-6
    own = torch.cat(trainer.logprobs([batch]))
    reference = torch.cat(Trainer(config).logprobs([batch]))
    pulled = replace(batch, advantages=(batch.advantages + 2.0 * (reference - own).numpy()).astype(np.float32))
    held, trainer.reference = trainer.reference, None
    by_hand = hf_gradients(trainer, step_batch(1, [pulled]))
    trainer.reference = held
    assert_close(hf_gradients(trainer, step_batch(1, [batch])), by_hand, 1e-6)
    found = trainer.step(step_batch(1, [batch])).known()["reference_kl"]
    ratio = (own - torch.from_numpy(batch.behaviour_logprobs)).exp()
    assert found == pytest.approx(float((ratio * (own - reference)).mean()), abs=1e-5) and abs(found) > 1e-3
