"""Students that the learner would refuse are refused before the start; every file with an end token is read."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from small_runs import make_model, small_topology, write_json

from opd_async.checks.validation import validate
from opd_async.config.topology import EngineKind
from opd_async.data.decoder import read_shape
from opd_async.data.end_tokens import end_ids
from opd_async.data.model_folder import read_model

MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
GEMMA = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def set_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    write_json(folder / "config.json", {key: value for key, value in config.items() if value != "absent"})


def found(root: Path) -> str:
    return "\n".join(line for line in validate(small_topology(root)) if line.startswith("models.student"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported"),
        ({"architectures": None}, "architecture none is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope type longrope is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor is '4', not a number above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 1}}, "truncate is 1, not true or false"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attn": 1}}, "attn of rope type yarn is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "that differ between layers"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section of rope type default"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 2}, "sliding_window is 0, not a whole"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is not a list of 4 times"),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "but use_sliding_window or sliding_window is not",
        ),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types is not a list of 4 times full_attention or sliding"),
        ({"architectures": ["LlamaForCausalLM"], "layer_types": ["sliding_attention"] * 4}, "layers with a sliding"),
        (MISTRAL | {"sliding_window": 8, "layer_types": ["full_attention"] * 4}, "layer_types of Mistral that differ"),
        (GEMMA | {"hidden_activation": "gelu"}, "hidden_activation gelu is not supported (only gelu_pytorch_tanh)"),
        (GEMMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported (only null)"),
        (GEMMA | {"rope_parameters": {"sliding_attention": {"rope_type": "ntk"}}}, "rope type ntk is not supported"),
        ({"attention_bias": True}, "mlp_bias and attention_bias are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({"rms_norm_eps": "absent"}, "has no key 'rms_norm_eps'"),
        ({"hidden_size": "8"}, "hidden_size is '8', not a whole number"),
        ({"dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config (fp8): quantised weights"),
        ({"quantization_config": {}}, "quantization_config: quantised weights"),
        ({"compression_config": {"format": "pack"}}, "compression_config: quantised weights"),
        ({"intermediate_size": 16}, "is [12, 8] where config.json asks for [16, 8]"),
        ({"num_hidden_layers": 8}, "missing, which its config.json asks for"),
    ],
)
def test_students_that_the_learner_would_refuse(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    assert found(tmp_path) == ""
    small = small_topology(tmp_path)
    set_config(small.models.student.path, **changes)
    problems = "\n".join(line for line in validate(small) if line.startswith("models.student"))
    assert expected in problems


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"rope_scaling": YARN},
        {"rope_parameters": YARN | {"rope_theta": 1e6, "beta_fast": 16, "mscale": 1.0, "mscale_all_dim": 0.5}},
        {"layer_types": ["full_attention"] * 4},
        {"rope_scaling": None, "quantization_config": None, "attention_bias": False},
    ],
)
def test_keys_that_change_nothing_are_fine(tmp_path: Path, changes: dict[str, Any]) -> None:
    small = small_topology(tmp_path)
    set_config(small.models.student.path, **changes)
    assert validate(small) == []


def test_defaults_of_each_family(tmp_path: Path) -> None:
    """What transformers' own configs say where a file leaves a key out."""
    folder = make_model(tmp_path / "model")
    qwen = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    for changes, window, windowed in (
        ({}, None, []),
        (qwen, 8, [1, 2, 3]),
        (qwen | {"layer_types": ["sliding_attention"] + ["full_attention"] * 3}, 8, [0]),
        (MISTRAL | {"sliding_window": None}, None, []),
        (MISTRAL | {"sliding_window": "absent"}, 4096, [0, 1, 2, 3]),
        (GEMMA | {"sliding_window": 8, "use_sliding_window": False, "layer_types": None}, 8, [0, 1, 2, 3]),
        (GEMMA | {"sliding_window": 8, "sliding_window_pattern": 2}, 8, [0, 2]),
    ):
        make_model(folder)
        set_config(folder, **changes)
        shape = read_shape(folder)
        assert (shape.window, sorted(shape.windowed)) == (window, windowed)
    assert shape.window_rope is not None
    assert (shape.rope.theta, shape.window_rope.theta, shape.query_scalar, shape.tied) == (1e6, 1e4, 256.0, True)
    set_config(folder, tie_word_embeddings="absent", rope_scaling={"rope_type": "linear", "factor": 8.0})
    shape = read_shape(folder)
    assert shape.tied and shape.window_rope is not None
    assert (shape.rope.kind, shape.rope.factor, shape.window_rope.kind) == ("linear", 8.0, "default")


def test_yarn_stretches_the_positions(tmp_path: Path) -> None:
    """Whichever of the two `max_position_embeddings` is; what the config leaves out is transformers' default."""
    folder = make_model(tmp_path / "model")
    for most in (64, 80, 256):
        make_model(folder, max_position_embeddings=most, rope_scaling=YARN)
        assert read_model(folder).max_tokens == read_shape(folder).max_positions == 256
    rope = read_shape(folder).rope
    assert (rope.beta_fast, rope.beta_slow, rope.original_positions) == (32.0, 1.0, 64)
    assert rope.magnitude == pytest.approx(0.1 * math.log(4.0) + 1.0)
    assert read_shape(folder).score_scale(0) == pytest.approx(rope.magnitude**2 / 2.0)
    short = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    make_model(folder, rope_scaling=short | {"attention_factor": 1.5})
    assert (read_shape(folder).rope.original_positions, read_shape(folder).rope.magnitude) == (128, 1.5)


def change_header(file: Path, change: Any) -> None:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_tensors_that_are_not_plain_or_have_no_place(tmp_path: Path) -> None:
    small = small_topology(tmp_path)
    folder = small.models.student.path
    name = "model.layers.0.mlp.up_proj.weight"
    size = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for extra in (f"{name}_scale_inv", "model.layers.1.self_attn.sinks", "lm_head.bias"):
        kept = (folder / "model.safetensors").read_bytes()
        change_header(
            folder / "model.safetensors", lambda header, e=extra: header.update({e: {"dtype": "F32", **size}})
        )
        assert any(f"{extra} is stored, for which this architecture has no place" in line for line in validate(small))
        (folder / "model.safetensors").write_bytes(kept)
    for dtype in ("F8_E4M3", "I8", "U8", "F64"):
        change_header(folder / "model.safetensors", lambda header, d=dtype: header[name].update(dtype=d))
        assert any(f"{name} is stored as {dtype}, not F32" in line for line in validate(small))


def test_weights_under_another_name(tmp_path: Path) -> None:
    small = small_topology(tmp_path)
    folder = small.models.student.path
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert any("has weights.safetensors, but no model.safetensors" in line for line in validate(small))


def test_an_end_token_that_only_the_tokenizer_names(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", eos_token_id=None)
    (folder / "generation_config.json").unlink()
    assert end_ids(folder) == (2,)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {key: value for key, value in config.items() if key != "eos_token"})
    assert end_ids(folder) == ()
    write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<eos>"}})
    assert end_ids(folder) == (2,)
    write_json(folder / "generation_config.json", {"eos_token_id": [5, 3]})
    assert end_ids(folder) == (2, 3, 5)
    shutil.rmtree(folder)
    assert end_ids(folder) == ()


def test_a_teacher_on_sglang_may_name_its_weights_as_it_likes(tmp_path: Path) -> None:
    """SGLang reads every `*.safetensors`; transformers, and so the embedded engine, only those of its own names."""
    small = small_topology(tmp_path)
    assert small.models.teacher is not None
    folder = small.models.teacher.path
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    refused = [line for line in validate(small) if line.startswith("models.teacher.path")]
    assert "has consolidated.safetensors" in "".join(refused)
    engines = small.engines.model_copy(
        update={"teacher": small.engines.teacher.model_copy(update={"kind": EngineKind.SGLANG})}
    )
    free = small.model_copy(update={"engines": engines})
    assert [line for line in validate(free) if line.startswith("models.teacher")] == []
    (folder / "consolidated.safetensors").unlink()
    assert any("has no *.safetensors" in line for line in validate(free))


def test_a_quantised_teacher_needs_an_engine_that_knows_its_scales(tmp_path: Path) -> None:
    small = small_topology(tmp_path)
    assert small.models.teacher is not None
    set_config(small.models.teacher.path, quantization_config={"quant_method": "gptq", "bits": 4})
    assert any(
        line.startswith("models.teacher.path") and "quantization_config (gptq): quantised weights" in line
        for line in validate(small)
    )
