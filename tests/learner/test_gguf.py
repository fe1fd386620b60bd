"""GGUF files as models: made into folders once, bit for bit where they are plain, and refused in words."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_learner import write_model

from opd_async.checks.models import with_models_here
from opd_async.config.topology import Topology
from opd_async.data.gguf import cached_folder, folder_of
from opd_async.data.model_folder import read_model
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError
from opd_async.learner.hf.gguf import gguf_to_hf

HEADS, KV_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def name_in_file(name: str) -> str:
    """What a GGUF file calls a weight of a Qwen2 model."""
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    outside["lm_head.weight"] = "output.weight"
    if name in outside:
        return outside[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def in_file(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A weight of a Llama model as GGUF has it: each rotated pair of channels of a head is side by side."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return array
    halves = array.reshape(heads, 2, len(array) // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def write_gguf(file: Path, weights: dict[str, torch.Tensor], quantised: bool = False, family: str = "qwen2") -> None:
    """A Qwen2 or Llama model of `tiny_learner.write_model` with a tokenizer of as many letters, as a GGUF file."""
    writer = gguf.GGUFWriter(file, family)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    rows = weights["model.embed_tokens.weight"].shape[0]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(ord("A") + index) for index in range(rows - 2)), "AB", "<end>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * (rows - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(rows - 1)
    for name, tensor in weights.items():
        array = in_file(name, tensor.float().numpy()) if family == "llama" else tensor.float().numpy()
        if quantised and array.ndim == 2 and array.shape[-1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name_in_file(name), gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name_in_file(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    return load_file(write_model(tmp_path / "hf", "qwen2") / "model.safetensors")


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_plain_weights_are_the_same_bit_for_bit(tmp_path: Path, family: str) -> None:
    weights = load_file(write_model(tmp_path / family, family) / "model.safetensors")
    write_gguf(tmp_path / "model.gguf", weights, family=family)
    gguf_to_hf(tmp_path / "model.gguf", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert Tokenizer(tmp_path / "out").encode("BADAB") == [1, 0, 3, 31]
    assert not list(tmp_path.glob("*.tmp"))


def test_quantised_weights_become_plain_ones(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    write_gguf(tmp_path / "model.gguf", weights, quantised=True)
    gguf_to_hf(tmp_path / "model.gguf", tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    exact = torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(weights[name].numpy(), kind), kind)))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], exact.to(torch.bfloat16))
    gguf_to_hf(tmp_path / "model.gguf", tmp_path / "whole", "float32")
    assert torch.equal(load_file(tmp_path / "whole" / "model.safetensors")[name], exact)


@pytest.mark.parametrize(
    ("family", "keep", "words"),
    [("qwen2", 3000, "not a GGUF file, or cut short"), ("rwkv9", None, "transformers cannot make a model of it")],
)
def test_what_is_no_model_is_one_message(
    tmp_path: Path, weights: dict[str, torch.Tensor], family: str, keep: int | None, words: str
) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(file, weights, family=family)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=words):
        gguf_to_hf(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_there_is_not_made_up(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]
    write_gguf(tmp_path / "model.gguf", weights)
    with pytest.raises(InputError, match=r"it lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        gguf_to_hf(tmp_path / "model.gguf", tmp_path / "out")


def test_a_topology_may_name_the_file(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted once; a file that is not whole is a problem of its key."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    good, broken = tmp_path / "good.gguf", tmp_path / "broken.gguf"
    write_gguf(good, weights)
    broken.write_bytes(good.read_bytes()[:2000])
    topology = Topology.model_validate(
        {
            "name": "named",
            "models": {"student": {"path": good}, "teacher": {"path": broken}},
            "data": {"train": {"path": "train.jsonl"}},
            "schedule": {"steps": 1, "tokens_per_step": 64},
        }
    )
    said: list[str] = []
    found, problems = with_models_here(topology, said.append)
    assert found.models.student.path == cached_folder(good)
    assert read_model(found.models.student.path).layers == 2
    assert len(problems) == 1 and problems[0].startswith(f"models.teacher.path: {broken}: not a GGUF file")
    assert sum(str(good) in line for line in said) == 1
    said.clear()
    assert with_models_here(topology, said.append)[0].models.student.path == cached_folder(good)
    assert not any(str(good) in line for line in said)


def test_two_launches_may_convert_one_file(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    write_gguf(file, weights)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(folder_of, [file, file]))
    assert found == [cached_folder(file)] * 2
    assert list(cached_folder(file).parent.iterdir()) == [cached_folder(file)], "nothing is left of the other"
    assert read_model(found[0]).layers == 2
