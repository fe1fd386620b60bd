"""Every parameter of published models, by name and shape, against transformers and against Megatron: no weights needed.

The numbers are those of the models' public `config.json`. `fake_ranks` builds Megatron's side on the meta device, for
ranks of a layout that is never started.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from deadlines import patience
from transformers.core_model_loading import revert_weight_conversion

from opd_async.learner.hf.mapping import slots
from opd_async.learner.model.architecture import ModelShape, read_shape

HERE = Path(__file__).parent
TIMEOUT_S = 150.0
COMMON = {
    "hidden_act": "silu",
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}
DENSE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
SPARSE = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-8B": COMMON
    | DENSE
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Qwen3-32B": COMMON
    | DENSE
    | {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "Qwen3-30B-A3B": COMMON
    | SPARSE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
MODELS |= {
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "gemma-3-12b-text": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "max_position_embeddings": 131072,
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "vocab_size": 262208,
    },
}
PARAMETERS = {
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Mistral-7B-v0.1": 7_241_732_096,
    "gemma-3-12b-text": 11_766_034_176,
}
LAYOUTS = [(2, 2), (4, 1), (1, 4)]
"""Tensor- and pipeline-parallel sizes."""
MIDDLE_EXPERTS = re.compile(r"local_experts\.(?!(0|127)\.)")


@pytest.fixture(params=sorted(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write_config(folder: Path, name: str) -> ModelShape:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name]), encoding="utf-8")
    return read_shape(folder)


def stored_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes that transformers writes for this config."""
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        stored = revert_weight_conversion(model, dict(model.state_dict()))
    if config.tie_word_embeddings:
        del stored["lm_head.weight"]
    return {key: tuple(tensor.shape) for key, tensor in stored.items()}


def test_every_tensor_of_transformers_has_one_slot(name: str, tmp_path: Path) -> None:
    shape = write_config(tmp_path, name)
    mapped = [pair for slot in slots(shape, 1) for pair in zip(slot.hf_names, slot.hf_shapes, strict=True)]
    stored = stored_tensors(tmp_path)
    assert len(mapped) == len(dict(mapped))
    assert dict(mapped) == stored
    assert sum(torch.Size(size).numel() for _, size in mapped) == PARAMETERS[name]


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
def test_shards_are_cut_and_joined_to_the_same_shapes(name: str, tmp_path: Path, tensor: int, pipeline: int) -> None:
    """Every stage has its own layers, and what the ranks of a stage hold adds up to the tensors, padding apart."""
    shape = write_config(tmp_path, name)
    everything = slots(shape, pipeline)
    assert len({(slot.stage, slot.name) for slot in everything}) == len(everything)
    assert {slot.stage for slot in everything} == set(range(pipeline))
    for slot in everything:
        if MIDDLE_EXPERTS.search(slot.name):  # as the first and the last, and thousands of them
            continue
        full = [torch.empty(size, device="meta") for size in slot.hf_shapes]
        parts = [slot.split(full, rank, tensor) for rank in range(tensor)]
        assert len({part.shape for part in parts}) == 1
        held = sum(part.numel() for part in parts) // (1 if slot.sharded else tensor)
        assert held == sum(part.numel() for part in full)
        assert tuple(tuple(part.shape) for part in slot.join(parts)) == slot.hf_shapes


def test_every_parameter_of_megatron_has_one_slot(tmp_path: Path) -> None:
    """Split in two by tensor and in two by pipeline: Megatron's own names and shapes are those of the slots."""
    for model in MODELS:
        write_config(tmp_path / model, model)
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_ranks.py"), *(str(tmp_path / model) for model in sorted(MODELS))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=patience(TIMEOUT_S),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == 2 * len(MODELS)
