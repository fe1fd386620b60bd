"""Conversion both ways: bit for bit, without touching what is read, and refusing what cannot be right."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_learner import learner_config, micro_batch, step_batch, write_model

from opd_async.errors import InputError
from opd_async.learner import resume
from opd_async.learner.checkpoints import model as model_checkpoint
from opd_async.learner.config import ParallelConfig
from opd_async.learner.convert import hf_to_megatron, main, megatron_to_hf
from opd_async.learner.distributed.parallel import Place
from opd_async.learner.errors import CheckpointError, ModelError
from opd_async.learner.hf import io as hf_io
from opd_async.learner.hf.mapping import slots
from opd_async.learner.model.architecture import read_shape
from opd_async.learner.trainer import Trainer
from opd_async.run import checkpoints

ONE = ParallelConfig()


def digests(folder: Path) -> dict[str, str]:
    """Every file of the folder and what is in it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps(trainer: Trainer, count: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of the next steps."""
    result = []
    for _ in range(count):
        metrics = trainer.step(step_batch(trainer.version, [micro_batch([9, 20, 14], seed=trainer.version)]))
        result.append((metrics.loss, metrics.grad_norm))
    return result


@pytest.mark.parametrize("kind", ["qwen3-tied", "qwen2", "llama", "qwen3-moe", "mistral", "gemma3"])
def test_there_and_back_changes_no_bit(alone: Place, tmp_path: Path, kind: str) -> None:
    hf = write_model(tmp_path / "hf", kind)
    (hf / "tokenizer.json").write_text("{}", encoding="utf-8")
    before = digests(hf)
    hf_to_megatron(hf, tmp_path / "megatron", ONE)
    megatron_to_hf(tmp_path / "megatron", hf, tmp_path / "back", ONE)
    there, back = (load_file(folder / "model.safetensors") for folder in (hf, tmp_path / "back"))
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) for name in there)
    assert {name for name in before if "safetensors" not in name} <= set(digests(tmp_path / "back"))
    assert digests(hf) == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("dtype", "beside", "message"),
    [
        (torch.float8_e4m3fn, "_scale_inv", "is stored as F8_E4M3"),
        (torch.float8_e5m2, "_scale", "is stored as F8_E5M2"),
        (torch.int8, "_scale", "is stored as I8"),
        (torch.uint8, ".absmax", "is stored as U8"),
        (torch.float32, "_scale_inv", "for which this architecture has no place"),
    ],
)
def test_codes_are_not_converted_as_if_they_were_weights(
    alone: Place, tmp_path: Path, dtype: torch.dtype, beside: str, message: str
) -> None:
    """Quantised linear weights with their scales beside them, also where config.json does not say so."""
    model_path = write_model(tmp_path / "codes", "qwen3-tied")
    weights = load_file(model_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weights[name + beside] = torch.ones(1)
    weights[name] = weights[name].to(dtype)
    save_file(weights, model_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        hf_to_megatron(model_path, tmp_path / "out", ONE)
    assert not (tmp_path / "out").exists()


def test_a_config_that_asks_for_more_than_there_is_is_compared_with_the_weights_first(
    alone: Place, tmp_path: Path
) -> None:
    model_path = write_model(tmp_path / "hf", "qwen3-tied")
    config = json.loads((model_path / "config.json").read_text())
    (model_path / "config.json").write_text(json.dumps(config | {"vocab_size": 1 << 36}))
    with pytest.raises(ModelError, match=r"embed_tokens.weight is \[33, 32\] where config.json asks for"):
        hf_to_megatron(model_path, tmp_path / "out", ONE)


def test_a_run_s_checkpoint_is_exported_and_stays_as_it_was(alone: Place, model_path: Path, tmp_path: Path) -> None:
    trainer = Trainer(learner_config(model_path))
    steps(trainer, 2)
    folder = checkpoints.step_folder(tmp_path, 2)
    resume.save(trainer, folder / "learner")
    checkpoints.seal(folder, 2)
    before = digests(folder)
    megatron_to_hf(folder, model_path, tmp_path / "hf", ONE)
    assert digests(folder) == before
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in hf_io.hf_weights(trainer.model))
    shard = folder / "learner" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"__0_0\.distcp"):
        megatron_to_hf(folder, model_path, tmp_path / "again", ONE)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_learner_starts_from_weights_alone(alone: Place, model_path: Path, tmp_path: Path, dtype: str) -> None:
    """As from the Hugging Face folder, also where the learner's dtype is not that of the checkpoint."""
    trained = Trainer(learner_config(model_path))
    steps(trained, 2)
    hf_io.save_hf(trained.model, tmp_path / "hf", model_path)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", ONE)
    expected = Trainer(learner_config(tmp_path / "hf", dtype=dtype))
    trainer = Trainer(learner_config(model_path, dtype=dtype))
    resume.load_weights(trainer, tmp_path / "megatron")
    assert trainer.version == 0
    assert steps(trainer, 3) == steps(expected, 3)


def test_biases_are_cut_as_the_rows_of_their_weights(tmp_path: Path) -> None:
    shape = read_shape(write_model(tmp_path, "qwen2"))
    layer = [slot for slot in slots(shape, 2) if slot.stage == 1 and "linear_qkv" in slot.name]
    found = {slot.name.rpartition(".")[2]: slot for slot in layer}
    full = [torch.arange(size[0]) + 1000 * index for index, size in enumerate(found["bias"].hf_shapes)]
    for rank in range(2):
        rows = found["weight"].split([part[:, None] for part in full], rank, 2)
        assert torch.equal(found["bias"].split(full, rank, 2), rows[:, 0])


def test_bfloat16_weights_stay_bfloat16(alone: Place, model_path: Path, tmp_path: Path) -> None:
    raw = json.loads((model_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text(json.dumps(raw))
    (half / "model.safetensors").write_bytes((model_path / "model.safetensors").read_bytes())
    hf_to_megatron(half, tmp_path / "megatron", ONE)
    assert model_checkpoint.stored_dtype(tmp_path / "megatron") is torch.bfloat16
    megatron_to_hf(tmp_path / "megatron", half, tmp_path / "back", ONE)
    back = load_file(tmp_path / "back" / "model.safetensors")
    stored = load_file(model_path / "model.safetensors")
    assert all(torch.equal(back[name], stored[name].to(torch.bfloat16)) for name in stored)


def test_what_is_not_a_checkpoint_of_the_model_is_refused(alone: Place, model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no Megatron checkpoint"):
        megatron_to_hf(model_path, model_path, tmp_path / "out", ONE)
    hf_to_megatron(model_path, tmp_path / "megatron", ONE)
    other = write_model(tmp_path / "other", "llama")
    with pytest.raises(CheckpointError, match=r"loaded into a LlamaForCausalLM of 2 layers: .*same model"):
        megatron_to_hf(tmp_path / "megatron", other, tmp_path / "out", ONE)
    with pytest.raises(ModelError, match="Hugging Face folder"):
        hf_to_megatron(tmp_path / "nowhere", tmp_path / "out", ONE)
    config = json.loads((model_path / "config.json").read_text()) | {"dtype": "float16"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="weights in float16 cannot be converted"):
        hf_to_megatron(other, tmp_path / "out", ONE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tp", "2", "--pp", "2"],
            "share the work among 4 processes, 1 run: start with `torchrun --nproc-per-node",
        ),
        (["--tp", "0"], "--tp 0"),
        ([], "exists already; remove it, or give another --out"),
    ],
)
def test_bad_options_end_with_one_message(
    model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["hf-to-megatron", "--hf", str(model_path), "--out", str(tmp_path), *options])
    assert end.value.code == 2
    assert message in caplog.text
