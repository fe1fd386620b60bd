"""Parse and validate the sampling parameters of one request. Pure, no torch.

The field names, defaults and the refusal of unknown keys are SGLang's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from opd_async.actors.engine.errors import ApiError

GREEDY_BELOW = 1e-6
ALL_TOKENS = 1 << 30

# Features of SGLang that this engine lacks, with the values that mean "off".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "stop_regex": (None, "", []),
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "repetition_penalty": (None, 1, 1.0),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
    "custom_params": (None, {}),
    "beam_width": (None, 1),
}
# Accepted without effect: SGLang ignores the seed unless deterministic inference is on.
_IGNORED = frozenset({"sampling_seed", "spaces_between_special_tokens"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one response is sampled.

    `temperature` is already 1.0 when `greedy`; `top_k` is `ALL_TOKENS` when off. `stream_interval` is in tokens,
    None means the server's. `logit_bias` is added to the logits of these ids before anything else.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    greedy: bool = False
    top_p: float = 1.0
    top_k: int = ALL_TOKENS
    min_p: float = 0.0
    stop_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)

    @property
    def filtered(self) -> bool:
        """True when top-k, top-p or min-p cut the distribution."""
        return not self.greedy and (self.top_k != ALL_TOKENS or self.top_p < 1.0 or self.min_p > 0.0)


_FIELDS = (*SamplingParams.__dataclass_fields__, "n", *_UNSUPPORTED, *_IGNORED)
KNOWN_FIELDS = tuple(name for name in _FIELDS if name != "greedy")


def parse_sampling_params(raw: object) -> SamplingParams:
    """Build SamplingParams from the JSON object of a request (None means all defaults).

    Raises ApiError (400) for unknown keys, wrong types, values out of range and unsupported features.
    """
    if raw is None:
        return SamplingParams()
    if not isinstance(raw, dict):
        raise ApiError(f"sampling_params must be an object, got {type(raw).__name__}")
    given = {key: value for key, value in raw.items() if value is not None}
    _refuse(raw, given)
    temperature = _number(given, "temperature", 1.0, "non-negative", lambda v: v >= 0.0)
    greedy = temperature < GREEDY_BELOW
    max_new_tokens = _integer(given, "max_new_tokens", 128, 0)
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if greedy else temperature,
        greedy=greedy,
        top_p=_number(given, "top_p", 1.0, "in (0, 1]", lambda v: 0.0 < v <= 1.0),
        top_k=_top_k(given),
        min_p=_number(given, "min_p", 0.0, "in [0, 1]", lambda v: 0.0 <= v <= 1.0),
        stop_token_ids=_stop_ids(given),
        stop=_stop_strings(given),
        ignore_eos=_flag(given, "ignore_eos", False),
        min_new_tokens=_min_new_tokens(given, max_new_tokens),
        skip_special_tokens=_flag(given, "skip_special_tokens", True),
        no_stop_trim=_flag(given, "no_stop_trim", False),
        stream_interval=_integer(given, "stream_interval", 1, 1) if "stream_interval" in given else None,
        logit_bias=_logit_bias(given),
    )


def _refuse(raw: dict[str, Any], given: dict[str, Any]) -> None:
    for key in raw:
        if key not in KNOWN_FIELDS:
            raise ApiError(f"unknown field `{key}`, expected one of {', '.join(KNOWN_FIELDS)}", bare=True)
    for key, neutral in _UNSUPPORTED.items():
        if key in given and given[key] not in neutral:
            raise ApiError(f"sampling_params.{key} is not supported by the embedded engine; use SGLang for it")
    if _integer(given, "n", 1, 1) != 1:
        raise ApiError("sampling_params.n > 1 is not supported by the embedded engine; send n requests")


def _number(given: dict[str, Any], key: str, default: float, range_text: str, ok: Callable[[float], bool]) -> float:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not ok(value):
        raise ApiError(f"{key} must be a number {range_text}, got {value!r}")
    return float(value)


def _integer(given: dict[str, Any], key: str, default: int, minimum: int) -> int:
    value = given.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ApiError(f"{key} must be an integer of at least {minimum}, got {value!r}")
    return value


def _flag(given: dict[str, Any], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise ApiError(f"{key} must be true or false, got {value!r}")
    return value


def _top_k(given: dict[str, Any]) -> int:
    value = given.get("top_k", -1)
    if isinstance(value, bool) or not isinstance(value, int) or value < -1 or value == 0:
        raise ApiError(f"top_k must be -1 (off) or at least 1, got {value!r}")
    return ALL_TOKENS if value == -1 else value


def _min_new_tokens(given: dict[str, Any], max_new_tokens: int) -> int:
    value = _integer(given, "min_new_tokens", 0, 0)
    if value > max_new_tokens:
        raise ApiError(f"min_new_tokens must be in [0, max_new_tokens({max_new_tokens})], got {value}")
    return value


def _stop_ids(given: dict[str, Any]) -> frozenset[int]:
    ids = given.get("stop_token_ids", [])
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ApiError(f"stop_token_ids must be a list of integers, got {ids!r}")
    return frozenset(ids)


def _logit_bias(given: dict[str, Any]) -> dict[int, float]:
    """JSON has the ids as text. Whether they are in the vocabulary is the caller's to check."""
    raw = given.get("logit_bias", {})
    if not isinstance(raw, dict) or not all(key.isdecimal() for key in raw):
        raise ApiError(f"logit_bias must map token ids to numbers, got {raw!r:.100}")
    return {int(key): _number(raw, key, 0.0, "as a logit_bias", lambda _: True) for key in raw}


def _stop_strings(given: dict[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop", [])
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise ApiError(f"stop must be a string or a list of strings, got {stop!r}")
    return tuple(s for s in strings if s)
