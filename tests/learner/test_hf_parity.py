"""The sharded model against transformers: log-probabilities, gradients, and exact conversion both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_learner import assert_close, hf_gradients, learner_config, micro_batch, per_expert, step_batch, write_model
from transformers import AutoModelForCausalLM

from opd_async.data.decoder_tensors import decoder_tensors
from opd_async.learner.config import LossConfig
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import ModelError
from opd_async.learner.hf import files as hf_files
from opd_async.learner.hf import io as hf_io
from opd_async.learner.hf.mapping import slots
from opd_async.learner.model.architecture import RopeShape, read_shape
from opd_async.learner.trainer import Trainer
from opd_async.transport.step_batch import MicroBatch

KINDS = ["qwen3-tied", "qwen3-untied", "qwen2", "llama", "qwen3-moe", "qwen3-moe-raw"]
KINDS += ["qwen3-yarn", "qwen2-windows", "mistral", "gemma3"]


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_model(tmp_path / request.param, request.param)


def reference_logprobs(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """float32[R], one forward per sequence."""
    logprobs = []
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        ids = torch.from_numpy(batch.token_ids[start:end].astype("int64"))
        table = model(ids[None]).logits[0].log_softmax(-1)
        rows = [row - start for row in batch.rows.tolist() if start <= row < end]
        logprobs.append(table[rows, ids[[row + 1 for row in rows]]])
    return torch.cat(logprobs)


def test_logprobs_and_gradients_agree_with_transformers(alone: Place, path: Path) -> None:
    batch = micro_batch([5, 40, 23, 40, 39])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = reference_logprobs(model, batch)
    # The unclipped loss at a fixed advantage is a function of the log-probabilities that autograd can check alone.
    loss = LossConfig(kl_coef=0.0, clip_ratio=None)
    ratio = (expected - torch.from_numpy(batch.behaviour_logprobs)).exp()
    (-(ratio * torch.from_numpy(batch.advantages)).sum() / len(batch.rows)).backward()

    trainer = Trainer(learner_config(path, loss=loss))
    (found,) = trainer.logprobs([batch])
    torch.testing.assert_close(found, expected.detach(), rtol=0.0, atol=1e-4)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close(hf_gradients(trainer, step_batch(0, [batch])), per_expert(gradients), 1e-5)


def test_the_tensors_announced_are_those_of_transformers_and_of_the_learner(path: Path) -> None:
    """The checks before a start, the learner and transformers agree on every name and shape."""
    shape = read_shape(path)
    announced = decoder_tensors(shape)
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(path / "model.safetensors").items()}
    own = {
        name: tuple(size) for slot in slots(shape, 1) for name, size in zip(slot.hf_names, slot.hf_shapes, strict=True)
    }
    assert announced == stored == own


def test_export_returns_every_tensor_bit_for_bit(alone: Place, path: Path) -> None:
    trainer = Trainer(learner_config(path))
    stored = load_file(path / "model.safetensors")
    exported = dict(hf_io.hf_weights(trainer.model))
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], stored[name]) for name in stored)
    cast = dict(hf_io.hf_weights(trainer.model, torch.bfloat16))
    assert all(tensor.dtype is torch.bfloat16 and tensor.is_contiguous() for tensor in cast.values())


def test_saved_folder_is_read_by_transformers(
    alone: Place, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 20_000)
    (model_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    trainer = Trainer(learner_config(model_path))
    trainer.step(step_batch(0, [micro_batch([9, 17])]))
    out = tmp_path / "export"
    out.mkdir()
    (out / "stale").touch()
    (out / "step_00000010").mkdir()
    hf_io.save_hf(trainer.model, out, model_path)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert not (out / "stale").exists()
    assert (out / "step_00000010").is_dir()
    assert (out / "tokenizer.json").read_text() == "{}"
    batch = micro_batch([12, 30], seed=3)
    expected = reference_logprobs(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), batch).detach()
    torch.testing.assert_close(trainer.logprobs([batch])[0], expected, rtol=0.0, atol=1e-4)
    # and by ourselves, sharded
    (again,) = Trainer(learner_config(out)).logprobs([batch])
    torch.testing.assert_close(again, expected, rtol=0.0, atol=1e-4)


def test_a_folder_that_lacks_a_tensor_is_refused_by_name(alone: Place, model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model_path / "config.json").read_text())
    weights = load_file(model_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    cut = weights.pop(name)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"{name} is missing, which its config.json asks for"):
        Trainer(learner_config(tmp_path))
    save_file({**weights, name: cut[:-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj.weight is \[47, 32\] where config.json asks for \[48, 32\]"):
        Trainer(learner_config(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_attention, but use_sliding_window"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"num_hidden_layers": None}, "config.json"),
    ],
)
def test_configs_that_would_compute_something_else_are_refused(
    model_path: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    raw = json.loads((model_path / "config.json").read_text()) | change
    raw = {key: value for key, value in raw.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=message):
        read_shape(tmp_path)


def test_both_spellings_of_rope_are_read(model_path: Path, tmp_path: Path) -> None:
    raw = json.loads((model_path / "config.json").read_text())
    raw.pop("rope_parameters")
    old = raw | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_shape(tmp_path).rope == RopeShape(theta=5e5, kind="linear", factor=2.0)
    new = raw | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    (tmp_path / "config.json").write_text(json.dumps(new))
    assert read_shape(tmp_path).rope == RopeShape(theta=5e5, kind="linear", factor=2.0)


def test_a_folder_without_config_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Hugging Face folder"):
        read_shape(tmp_path)
