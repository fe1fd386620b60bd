"""What a step of a model takes on a device: arithmetic over shapes, shared by the forecast and the simulator.

    Decoder (config.json) + Device + Link -> DecodeCost, PrefillCost, TrainCost, seconds of a weight update

Times are rooflines with one efficiency each (`Device`); nothing here was fitted to a run. Sources: 2 N and 6 N
operations a token for forward and for forward and backward of N weights (Kaplan et al., 2020), 4 layers * heads *
head_dim operations for each pair of positions that attend (Q K^T and P V).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from opd_async.data.decoder import ARCHITECTURES, is_tied
from opd_async.data.layer_windows import windows
from opd_async.errors import InputError
from opd_async.forecast.devices import Device, Link

BF16 = 2
WIDTHS = {"float32": 4, "bfloat16": BF16, "float16": BF16}
"""Bytes of a number, by dtype."""
BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Sizes of a decoder with gated MLPs; with `experts`, each token takes `experts_per_token` MLPs of `ffn`."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False
    experts: int = 0
    experts_per_token: int = 0
    window: int = 0
    """Tokens that a position sees in `windowed_layers`; 0 where there are none."""
    windowed_layers: int = 0

    def _body(self, mlps: int) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn * mlps + self.experts * self.hidden)

    @property
    def head(self) -> int:
        """Weights of the LM head, a count: vocabulary times hidden size."""
        return self.vocab * self.hidden

    @property
    def body(self) -> int:
        """Weights that a token passes on its way to the LM head."""
        return self._body(self.experts_per_token or 1)

    @property
    def weights(self) -> int:
        """Weights of the whole model; a tied LM head counts once."""
        return self._body(self.experts or 1) + self.head * (1 if self.tied else 2)

    @property
    def headless(self) -> int:
        """All weights but those of an LM head of its own."""
        return self._body(self.experts or 1) + self.head

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that one token leaves in a cache, bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BF16

    @property
    def pair_flops(self) -> int:
        """Operations of a forward pass for one pair of positions, in layers that see everything."""
        return 4 * (self.layers - self.windowed_layers) * self.heads * self.head_dim

    @property
    def near_flops(self) -> int:
        """Operations of a forward pass for one pair of positions within the window, in layers that have one."""
        return 4 * self.windowed_layers * self.heads * self.head_dim


QWEN3_8B = Decoder(layers=36, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=12288, vocab=151936)
QWEN3_32B = Decoder(layers=64, hidden=5120, heads=64, kv_heads=8, head_dim=128, ffn=25600, vocab=151936)
QWEN3_30B_A3B = Decoder(
    layers=48, hidden=2048, heads=32, kv_heads=4, head_dim=128, ffn=768, vocab=151936, experts=128, experts_per_token=8
)


DECODE_FLOOR_S = 2e-3
"""Of a decode step: kernel launches, sampling, scheduling."""
DECODE_REQUEST_S = 20e-6
"""Of a decode step, for each running request: detokenisation and book-keeping."""
PREFILL_FLOOR_S = 10e-3
"""Of a prefill batch."""
TRAIN_FLOOR_S = 1.0
"""Of an optimizer step: packing, gradient reduction, the optimizer itself."""
SYNC_FLOOR_S = 0.1
"""Of a weight update: stopping the engines, gathering, bucketing, going on."""


@dataclass(frozen=True, slots=True)
class DecodeCost:
    """A decode step of one engine takes `floor_s` + `request_s` * requests + `kv_s` * tokens in their caches."""

    floor_s: float
    request_s: float
    kv_s: float = 0.0

    def seconds(self, steps: float, active: int, kv_tokens: float) -> float:
        """Of `steps` decode steps that begin with `kv_tokens`, each adding one for each of the `active` requests."""
        first = self.floor_s + self.request_s * active + self.kv_s * kv_tokens
        return steps * first + self.kv_s * active * steps * steps / 2

    def steps(self, seconds: float, active: int, kv_tokens: float) -> float:
        """Inverse of `seconds`, in the number of steps."""
        first = self.floor_s + self.request_s * active + self.kv_s * kv_tokens
        growth = self.kv_s * active
        if growth == 0.0:
            return seconds / first
        return (math.sqrt(first * first + 2 * growth * seconds) - first) / growth


@dataclass(frozen=True, slots=True)
class Pairs:
    """Seconds of attention: `pair_s` for each pair of positions, `near_s` for each pair within `window`."""

    pair_s: float = 0.0
    near_s: float = 0.0
    window: int = 0

    def seconds(self, tokens: Any) -> Any:
        """Of causal attention over so many tokens; a number, or an array of them."""
        beyond = np.maximum(tokens - self.window, 0)
        return self.pair_s * tokens * tokens / 2 + self.near_s * (tokens * tokens - beyond * beyond) / 2


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """A prefill batch takes `floor_s` + `token_s` * computed tokens + the seconds of `pairs`."""

    floor_s: float
    token_s: float
    pairs: Pairs = Pairs()

    def tokens_s(self, cached: int, total: int) -> float:
        """Seconds for the tokens of one request behind `cached` ones, without the batch's floor."""
        between = float(self.pairs.seconds(total) - self.pairs.seconds(cached))
        return (total - cached) * self.token_s + between


@dataclass(frozen=True, slots=True)
class TrainCost:
    """A step takes `floor_s` + `token_s` * forwarded tokens + `row_s` * trained tokens + `pairs`, for the learner
    as a whole; the LM head runs on trained rows only."""

    floor_s: float
    token_s: float
    row_s: float = 0.0
    pairs: Pairs = Pairs()

    def segment_s(self, tokens: int, rows: int) -> float:
        """Seconds for one sequence of `tokens` of which `rows` are trained."""
        return tokens * self.token_s + float(self.pairs.seconds(tokens)) + rows * self.row_s


def decode_cost(model: Decoder, device: Device, tensor_parallel: int = 1, dtype: str = BFLOAT16) -> DecodeCost:
    """Weights are read once a step (all experts: a batch meets them all), keys and values once; operations of one
    request beside them. Layers with a window count as if they read everything."""
    bandwidth = device.bandwidth * device.decode_share * tensor_parallel
    weights = model.weights - (0 if model.tied else model.head)
    flops_s = 2 * (model.body + model.head) / (device.flops_in(dtype) * device.prefill_share * tensor_parallel)
    width = WIDTHS[dtype]
    kv_s = model.kv_bytes / BF16 * width / bandwidth
    return DecodeCost(DECODE_FLOOR_S + weights * width / bandwidth, DECODE_REQUEST_S + flops_s, kv_s)


def prefill_cost(
    model: Decoder, device: Device, tensor_parallel: int = 1, with_head: bool = True, dtype: str = BFLOAT16
) -> PrefillCost:
    """A forward pass; `with_head` counts the LM head on every token, as scoring needs it."""
    flops = device.flops_in(dtype) * device.prefill_share * tensor_parallel
    head = model.head if with_head else 0
    return PrefillCost(PREFILL_FLOOR_S, 2 * (model.body + head) / flops, _pairs(model, 1 / flops))


def train_cost(
    model: Decoder, device: Device, devices: int, recompute: bool | Literal["selective"], dtype: str = BFLOAT16
) -> TrainCost:
    """Forward and backward on `devices` together; `recompute` runs the forward of the body twice, but no part of it
    that counts here where it is selective."""
    flops = device.flops_in(dtype) * device.train_share * devices
    passes = 4 if recompute is True else 3
    return TrainCost(
        TRAIN_FLOOR_S, passes * 2 * model.body / flops, 6 * model.head / flops, _pairs(model, passes / flops)
    )


def _pairs(model: Decoder, flop_s: float) -> Pairs:
    return Pairs(model.pair_flops * flop_s, model.near_flops * flop_s, model.window)


def sync_seconds(model: Decoder, link: Link, dtype: str = BFLOAT16) -> float:
    """A broadcast of all weights, for which generation stands still."""
    return SYNC_FLOOR_S + model.weights * WIDTHS[dtype] / (link.bandwidth * link.share)


def read_decoder(folder: Path) -> Decoder:
    """The sizes in a Hugging Face `config.json`. Raises `InputError` that names what is missing."""
    file = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_bytes())
        heads = config["num_attention_heads"]
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        family = _family(config)
        window, windowed = windows(config, family) if family else (None, frozenset[int]())
        return Decoder(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config["moe_intermediate_size"] if experts else config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=is_tied(config),
            experts=experts,
            experts_per_token=config["num_experts_per_tok"] if experts else 0,
            window=window or 0,
            windowed_layers=len(windowed),
        )
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: does not describe a decoder ({error!r}); give a complete config") from None


def _family(config: Mapping[str, Any]) -> str | None:
    """The family of a config, where it is one whose windows are known."""
    named = config.get("architectures")
    return ARCHITECTURES.get(str(named[0])) if isinstance(named, list) and named else None


RESERVED_SHARE = 0.1
"""Of a device's memory: activations, CUDA context, fragments."""


def engine_cache_tokens(model: Decoder, device: Device, tensor_parallel: int = 1, dtype: str = BFLOAT16) -> int:
    """Tokens whose keys and values fit beside the weights; 0 when the weights do not fit."""
    width = WIDTHS[dtype]
    free = device.memory * (1 - RESERVED_SHARE) * tensor_parallel - model.weights * width
    return max(0, int(free / (model.kv_bytes / BF16 * width)))
