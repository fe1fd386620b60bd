"""Shapes and costs against published sizes and against each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.errors import InputError
from opd_async.forecast.cost_model import (
    QWEN3_8B,
    QWEN3_30B_A3B,
    QWEN3_32B,
    DecodeCost,
    Decoder,
    decode_cost,
    engine_cache_tokens,
    prefill_cost,
    read_decoder,
    sync_seconds,
    train_cost,
)
from opd_async.forecast.devices import H100, H200, NETWORK_400G, NVLINK


@pytest.mark.parametrize(
    ("model", "billions", "active"),
    [(QWEN3_8B, 8.19, 6.95), (QWEN3_32B, 32.8, 31.2), (QWEN3_30B_A3B, 30.5, 2.7)],
    ids=["8B", "32B", "30B-A3B"],
)
def test_weights_are_those_of_the_published_models(model: Decoder, billions: float, active: float) -> None:
    assert model.weights / 1e9 == pytest.approx(billions, rel=0.01)
    assert model.body / 1e9 == pytest.approx(active, rel=0.02)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 500), st.integers(1, 256), st.floats(0, 1e6), st.sampled_from([0.0, 6e-8]))
def test_steps_invert_seconds(steps: float, active: int, kv_tokens: float, kv_s: float) -> None:
    cost = DecodeCost(8e-3, 5e-5, kv_s)
    assert cost.steps(cost.seconds(steps, active, kv_tokens), active, kv_tokens) == pytest.approx(steps, rel=1e-6)


def test_costs_fall_with_better_hardware() -> None:
    assert decode_cost(QWEN3_8B, H200).floor_s < decode_cost(QWEN3_8B, H100).floor_s
    assert prefill_cost(QWEN3_32B, H100, 2).token_s == pytest.approx(prefill_cost(QWEN3_32B, H100).token_s / 2)
    assert prefill_cost(QWEN3_30B_A3B, H100).token_s < prefill_cost(QWEN3_8B, H100).token_s
    assert train_cost(QWEN3_8B, H100, 8, False).segment_s(4096, 4096) < train_cost(QWEN3_8B, H100, 8, True).segment_s(
        4096, 4096
    )
    assert train_cost(QWEN3_8B, H100, 8, "selective") == train_cost(QWEN3_8B, H100, 8, False)
    assert sync_seconds(QWEN3_8B, NVLINK) < sync_seconds(QWEN3_8B, NETWORK_400G)


def test_a_prefix_in_the_cache_costs_attention_only() -> None:
    cost = prefill_cost(QWEN3_8B, H100)
    whole = cost.tokens_s(0, 4096)
    parts = cost.tokens_s(0, 1024) + cost.tokens_s(1024, 4096)
    assert parts == pytest.approx(whole)


def test_a_window_bounds_the_pairs_that_attend() -> None:
    """Half of the layers see 4 tokens: a causal triangle up to there, four a token beyond."""
    layers = {"layers": 4, "hidden": 8, "heads": 2, "kv_heads": 2, "head_dim": 4, "ffn": 8, "vocab": 8}
    full, near = Decoder(**layers), Decoder(**layers, window=4, windowed_layers=2)
    costs = [prefill_cost(model, H100) for model in (full, near)]
    short, long = ([cost.tokens_s(0, tokens) - tokens * cost.token_s for cost in costs] for tokens in (4, 10))
    assert short[0] == pytest.approx(short[1])
    assert long[1] / long[0] == pytest.approx((50 + 8 + 6 * 4) / 100)
    for cost in costs:
        assert cost.tokens_s(0, 3) + cost.tokens_s(3, 10) == pytest.approx(cost.tokens_s(0, 10))


def test_a_config_with_windows_is_read(tmp_path: Path) -> None:
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 26,
        "hidden_size": 1152,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 6912,
        "vocab_size": 262144,
        "sliding_window": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read_decoder(tmp_path)
    assert (model.window, model.windowed_layers, model.tied) == (512, 22, True)
    assert model.weights == pytest.approx(999_885_952, rel=1e-3)


def test_no_room_for_a_cache_beside_weights_that_do_not_fit() -> None:
    assert engine_cache_tokens(QWEN3_32B, H100) > 0
    assert (
        engine_cache_tokens(
            Decoder(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocab=128256), H100
        )
        == 0
    )


def test_a_config_file_is_read(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_decoder(tmp_path) == QWEN3_30B_A3B
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="hidden_size"):
        read_decoder(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_decoder(tmp_path / "absent")
