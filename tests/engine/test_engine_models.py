"""Model folders that the embedded engine would compute wrongly are refused when it loads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_harness import make_model
from safetensors.torch import load_file, save_file

from opd_async.actors.engine.model import ModelRunner
from opd_async.errors import InputError

NAME = "model.layers.1.mlp.up_proj.weight"


def load(folder: Path) -> ModelRunner:
    return ModelRunner(folder, dtype="float32", device="cpu", pool_tokens=64, seed=0)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add, replace or (None) remove tensors of the folder."""
    weights = load_file(folder / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "codes")
    weights = load_file(folder / "model.safetensors")
    change(folder, **{NAME: weights[NAME].to(torch.float8_e4m3fn), f"{NAME}_scale_inv": torch.ones(1)})
    with pytest.raises(InputError, match="stored as F8_E4M3"):
        load(folder)
    told = make_model(tmp_path / "told")
    config = json.loads((told / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (told / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"quantization_config \(awq\)"):
        load(told)


def test_tensors_that_are_missing_or_more_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    change(folder, **{"model.layers.1.self_attn.sinks": torch.ones(4)})
    with pytest.raises(InputError, match=r"self_attn\.sinks have no place in the model"):
        load(folder)
    save_file({name: t for name, t in whole.items() if name != NAME}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj\.weight are missing"):
        load(folder)


def test_the_tokenizer_s_end_token_ends_responses(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    assert load(folder).eos_ids == frozenset()
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 7}, "unk_token": "a"}})
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load(folder).eos_ids == frozenset({7})
