"""Whose kernels a model gets: torch's on the CPU; on CUDA what is asked for, or an error that says why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_learner import learner_config

from opd_async.learner.config import LearnerConfig, ParallelConfig
from opd_async.learner.errors import ModelError
from opd_async.learner.model import gated, kernels, liger, norm, packs
from opd_async.learner.model.architecture import ModelShape, read_shape
from opd_async.learner.model.kernels import Kernels, choose

TORCH = ", norms and gates by torch"


@pytest.fixture
def shape(model_path: Path) -> ModelShape:
    return read_shape(model_path)


@pytest.fixture
def config(model_path: Path) -> LearnerConfig:
    return learner_config(model_path, dtype="bfloat16")


class Gpu:
    """A GPU that is not there, with packages that are not installed, and what was tried on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability, self.installed = (9, 0), True
        self.problem: str | None = None
        self.tried: list[tuple[Any, ...]] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: self.capability)
        monkeypatch.setattr(kernels, "find_spec", lambda _name: "there" if self.installed else None)
        monkeypatch.setattr(kernels, "import_module", self.import_module)
        monkeypatch.setattr(packs, "problem", self.try_kernel)

    def import_module(self, name: str) -> Any:
        if not self.installed:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return SimpleNamespace()  # without what is looked for

    def try_kernel(self, *case: Any) -> str | None:
        self.tried.append(case)
        return self.problem


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_on_the_cpu_torch_computes_everything(config: LearnerConfig, shape: ModelShape) -> None:
    for asked in ("auto", "torch"):
        assert choose(replace(config, kernels=asked), shape) == Kernels(said=f"attention by torch{TORCH}")
    for asked in ("te", "liger"):
        with pytest.raises(ModelError, match=f"learner.kernels: {asked}, whose kernels run on CUDA only, and there is"):
            choose(replace(config, kernels=asked), shape)


def test_flash_attention_3_where_it_works(gpu: Gpu, config: LearnerConfig, shape: ModelShape) -> None:
    assert choose(config, shape) == Kernels(attention=packs.by_flash3, said=f"attention by FlashAttention 3{TORCH}")
    assert gpu.tried == [(packs.by_flash3, 4, 2, 16, None)]
    assert choose(replace(config, dtype="float32"), shape).said == f"attention by torch{TORCH}"
    gpu.tried.clear()
    windowed = replace(shape, window=8, windowed=frozenset({1}))
    choose(replace(config, parallel=ParallelConfig(tensor=2)), windowed)
    assert sorted(gpu.tried, key=str) == sorted([(packs.by_flash3, 2, 1, 16, each) for each in (None, 8)], key=str)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kernels": "torch"}, "learner.kernels: torch"),
        ({"capability": (10, 0)}, "FlashAttention 3 is for Hopper GPUs"),
        ({"installed": False}, "FlashAttention 3 is not installed"),
        ({"problem": "no backward pass"}, "FlashAttention 3 cannot do this model: no backward pass"),
    ],
)
def test_elsewhere_torchs_and_why(
    gpu: Gpu, config: LearnerConfig, shape: ModelShape, change: dict[str, Any], reason: str
) -> None:
    asked = replace(config, kernels=change.get("kernels", "auto"))
    for name in {"capability", "installed", "problem"} & change.keys():
        setattr(gpu, name, change[name])
    found = choose(asked, shape)
    assert found == Kernels(said=f"attention by torch's FlashAttention 2 ({reason}){TORCH}")


def test_what_is_asked_for_and_cannot_be_had_is_an_error(
    gpu: Gpu, config: LearnerConfig, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    te = replace(config, kernels="te")
    with pytest.raises(ModelError, match=r"te, which cannot be imported \(.*DotProductAttention.*\); install transf"):
        choose(te, shape)
    monkeypatch.setattr(kernels, "PARTS", {"te": {}, "liger": {}})
    assert choose(te, shape).attention is packs.by_transformer_engine
    gpu.problem = "No dot product attention backend is available"
    with pytest.raises(ModelError, match=r"te, whose attention cannot do this model here \(No dot product"):
        choose(te, shape)
    for changed, text in (
        (replace(te, dtype="float32"), "te, whose attention takes no float32; write learner.dtype: bfloat16"),
        (replace(te, parallel=ParallelConfig(context=2)), "learner.context_parallel has an attention of its own"),
    ):
        with pytest.raises(ModelError, match=text):
            choose(changed, shape)
    with pytest.raises(ModelError, match="heads of at most 256 channels, a multiple of 8, and this model's have 20"):
        choose(te, replace(shape, head_dim=20))


def test_liger_takes_norms_and_gates(
    gpu: Gpu, config: LearnerConfig, shape: ModelShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PARTS", {"liger": {}})
    asked = replace(config, kernels="liger", dtype="float32")
    found = choose(asked, shape)
    assert (found.norm, found.gate) == (liger.norm, liger.gate)
    assert found.said == "attention by torch, norms by Liger, gates by Liger"
    assert choose(asked, replace(shape, activation="gelu_pytorch_tanh")).said.endswith("gates by torch")
    with pytest.raises(ModelError, match="rows of at most 65,536 channels, and this model has 70,000 MLP channels"):
        choose(asked, replace(shape, ffn=70_000))


def test_torchs_are_the_learners_own() -> None:
    own = Kernels()
    assert (own.attention, own.norm, own.gate) == (packs.by_torch, norm.by_torch, gated.by_torch)
