"""`opd.function`: a loss of the user's own has the gradient that it says; one that cannot be trained on is named."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_learner import EMPTY, assert_close, hf_gradients, learner_config, micro_batch, split, step_batch

from opd_async.hooks import HookError
from opd_async.learner.config import LossConfig
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.losses.divergences import DIVERGENCES
from opd_async.learner.losses.objective import SAMPLED
from opd_async.learner.losses.own import OwnLoss
from opd_async.learner.losses.sampled import LossOutput
from opd_async.learner.trainer import Trainer

MODULE = """
import torch
from opd_async import LossOutput, LossRows

def reverse(rows: LossRows) -> LossOutput:
    signal = rows.teacher_R - rows.logprobs_R.detach()
    return LossOutput(-((rows.logprobs_R - rows.behaviour_R).exp() * (signal + rows.advantages_R)).sum())

def twice(rows: LossRows) -> LossOutput:
    return LossOutput(2 * reverse(rows).loss)

def forward(rows: LossRows) -> LossOutput:
    teacher = rows.topk_logprobs_RK
    return LossOutput((teacher.exp() * (teacher - rows.student_topk_RK)).sum())

def raising(rows: LossRows) -> LossOutput:
    raise KeyError("no such row")

def bare(rows: LossRows) -> LossOutput:
    return rows.logprobs_R.sum()

def many(rows: LossRows) -> LossOutput:
    return LossOutput(rows.logprobs_R)

def cut_off(rows: LossRows) -> LossOutput:
    return LossOutput(rows.logprobs_R.detach().sum())

def infinite(rows: LossRows) -> LossOutput:
    return LossOutput(rows.logprobs_R.sum() * torch.inf)
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loss_hooks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("loss_hooks", None)


def test_what_it_imports_later_is_found_where_the_run_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("loss_more.py").write_text("FACTOR = 3")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(Path.cwd()))])
    OwnLoss("loss_hooks:reverse")
    assert importlib.import_module("loss_more").FACTOR == 3
    del sys.modules["loss_more"]


def trainer(model_path: Path, config: LossConfig) -> Trainer:
    return Trainer(learner_config(model_path, loss=config))


def test_it_has_the_gradient_of_the_loss_that_it_repeats(alone: Place, model_path: Path) -> None:
    """`reverse_kl` without a clip; in parts and beside an empty micro-batch as well."""
    plain = LossConfig(loss="reverse_kl", clip_ratio=None)
    whole = micro_batch([9, 31, 14])
    wanted = hf_gradients(trainer(model_path, plain), step_batch(0, [whole]))
    own = trainer(model_path, replace(plain, function="loss_hooks:reverse"))
    assert_close(hf_gradients(own, step_batch(0, [whole])), wanted, 1e-6)
    assert_close(hf_gradients(own, step_batch(0, [*split(whole), EMPTY])), wanted, 1e-6)


def test_it_is_trained_in_place_of_the_configured_loss_and_reported(alone: Place, model_path: Path) -> None:
    batch, plain = step_batch(0, [micro_batch([9, 31, 14])]), LossConfig(loss="reverse_kl", clip_ratio=None)
    configured, own = trainer(model_path, plain), trainer(model_path, replace(plain, function="loss_hooks:twice"))
    doubled = {name: 2 * gradient for name, gradient in hf_gradients(configured, batch).items()}
    assert_close(hf_gradients(own, batch), doubled, 1e-6)
    losses = [each.gradients(batch).sums["loss"] for each in (configured, own)]
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)


@pytest.mark.parametrize("name", [*sorted(SAMPLED), *sorted(DIVERGENCES), "own"])
def test_what_a_loss_reports_holds_no_graph(
    alone: Place, model_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A sum that did would keep the activations of every micro-batch until the end of the step."""
    loss, function = ("reverse_kl", "loss_hooks:reverse") if name == "own" else (name, None)
    learner = trainer(model_path, LossConfig(loss=loss, function=function, entropy_coef=0.1))
    outputs: list[LossOutput] = []
    kept = Trainer._objective
    monkeypatch.setattr(Trainer, "_objective", lambda *given: outputs.append(kept(*given)) or outputs[-1])
    learner.gradients(step_batch(0, [micro_batch([9, 12], k=4 if name in DIVERGENCES else 0)]))
    (output,) = outputs
    assert output.loss.requires_grad
    assert [key for key, value in (output.sums | output.maxima).items() if value.requires_grad] == []


def test_it_gets_the_top_k_where_the_loss_has_them(alone: Place, model_path: Path) -> None:
    config = LossConfig(loss="forward_kl_topk", function="loss_hooks:forward", clip_ratio=None)
    batch = step_batch(0, [micro_batch([9, 12], k=4)])
    gradients = hf_gradients(trainer(model_path, config), batch)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raising", r"raised KeyError: 'no such row' for samples 12, 7, a micro-batch of 10 rows; mend the function"),
        ("bare", r"returned tensor\(.*, but LossOutput\(loss\) has a float scalar"),
        ("many", r"returned a tensor of shape \(10,\), but LossOutput\(loss\) has a float scalar"),
        ("cut_off", r"returned a loss without gradient; compute it from rows.logprobs_R \(given samples 12, 7, a"),
        ("infinite", r"returned the loss -inf \(given samples 12, 7, a micro-batch of 10 rows\)"),
    ],
)
def test_what_cannot_be_trained_on_is_named(alone: Place, model_path: Path, name: str, words: str) -> None:
    own = trainer(model_path, LossConfig(function=f"loss_hooks:{name}"))
    batch = replace(micro_batch([9, 5]), sample_ids=np.array([12, 7]))
    with pytest.raises(HookError, match=f"^opd.function: loss_hooks:{name} {words}"):
        own.step(step_batch(0, [batch]))
    assert own.version == 0
