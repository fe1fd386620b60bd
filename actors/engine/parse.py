"""From the JSON body of POST /generate to Requests. Pure: no sockets, no torch.

A body holds one sequence (`input_ids: [1, 2]`) or a batch (`input_ids: [[1, 2], [3]]`); in a batch most fields may be
lists with one entry per sequence. Unknown top-level keys are ignored, as SGLang does.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_async.actors.engine.errors import ApiError
from opd_async.actors.engine.request import LogprobSpec, Request
from opd_async.actors.engine.sampling import SamplingParams, parse_sampling_params

MAX_PROMPTS = 4096
"""Sequences of one request; `score_batches.MAX_SAMPLES` stays below it."""
LONGEST_TOKEN = 256
"""Characters: a text with more than so many for each token of the context is not even encoded."""
_UNSUPPORTED = (
    "return_sampling_mask",
    "return_hidden_states",
    "return_routed_experts",
    "return_indexer_topk",
    "return_prompt_token_ids",
    "return_flat_raw_output_top_logprobs",
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "lora_path",
    "session_params",
    "session_id",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What a request is checked against."""

    vocab_size: int
    context_length: int
    pool_tokens: int
    eos_ids: frozenset[int]
    stream_interval: int
    encode: Callable[[str], list[int]] | None


@dataclass(slots=True)
class GenerateCall:
    """A parsed body: its requests in order, whether the answer is an array, and whether it is streamed."""

    requests: list[Request]
    batch: bool
    stream: bool


def parse_generate(body: object, limits: ModelLimits) -> GenerateCall:
    """Parse and validate a body. Raises ApiError (400) with a message that names the field."""
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    # Refused rather than ignored: the answer would lack what the client reads.
    for key in _UNSUPPORTED:
        if body.get(key):
            raise ApiError(f"{key} is not supported by the embedded engine; use SGLang for it")
    if body.get("return_flat_raw_top_logprobs_b64") and not body.get("return_flat_raw_top_logprobs"):
        raise ApiError("return_flat_raw_top_logprobs_b64 needs return_flat_raw_top_logprobs")
    prompts, batch = _prompts(body, limits)
    count = len(prompts)
    stream = _flag(body.get("stream"), "stream")
    rids = _rids(body.get("rid"), count, batch)
    params = _spread(body, "sampling_params", count, batch)
    # A batch usually repeats one object; parse equal ones once.
    parsed: dict[int, SamplingParams] = {}
    requests = []
    for index, ids in enumerate(prompts):
        raw = params[index]
        if id(raw) not in parsed:
            parsed[id(raw)] = parse_sampling_params(raw)
        spec = _logprob_spec(body, index, count, batch, len(ids), limits)
        requests.append(_request(body, rids[index], ids, parsed[id(raw)], spec, stream, limits, (index, count, batch)))
    return GenerateCall(requests, batch, stream)


def _request(
    body: dict[str, Any],
    rid: str,
    ids: list[int],
    params: SamplingParams,
    spec: LogprobSpec,
    stream: bool,
    limits: ModelLimits,
    place: tuple[int, int, bool],
) -> Request:
    _check_length(len(ids), params.max_new_tokens, limits)
    if params.stop and limits.encode is None:
        raise ApiError("stop strings need a tokenizer; this engine has none: send stop_token_ids")
    if params.logit_bias:
        _check_ids(list(params.logit_bias), "logit_bias", limits.vocab_size)
    salt = _pick(body, "cache_salt", *place) or ""
    extra = _pick(body, "extra_key", *place) or ""
    return Request(
        rid=rid,
        input_ids=ids,
        params=params,
        logprob=spec,
        namespace=f"{salt}\x1f{extra}" if salt or extra else "",
        stream=stream,
        stream_interval=params.stream_interval or limits.stream_interval,
        stop_ids=frozenset() if params.ignore_eos else params.stop_token_ids | limits.eos_ids,
    )


def _check_length(prompt: int, new: int, limits: ModelLimits) -> None:
    # With nothing to generate the prompt may fill the context: a response that ended there is scored like any other.
    if prompt + min(new, 1) > limits.context_length:
        raise ApiError(
            f"The input ({prompt} tokens) is longer than the model's context length ({limits.context_length} tokens)."
        )
    # A response that cannot fit the pool would be retracted for ever.
    total = prompt + new
    for limit, what in ((limits.context_length, "maximum context length"), (limits.pool_tokens, "KV pool")):
        if total > limit:
            raise ApiError(
                f"Requested token count exceeds the model's {what} of {limit} tokens: "
                f"{prompt} input tokens plus {new} for the completion make {total}."
            )


def _prompts(body: dict[str, Any], limits: ModelLimits) -> tuple[list[list[int]], bool]:
    ids, text = body.get("input_ids"), body.get("text")
    if (ids is None) == (text is None):
        raise ApiError("Either text or input_ids should be provided, and not both.")
    if ids is None:
        return _encode(text, limits)
    if not isinstance(ids, list) or not ids:
        raise ApiError("input_ids must be a non-empty list of token ids, or a list of such lists")
    batch = isinstance(ids[0], list)
    prompts: list[list[int]] = ids if batch else [ids]
    _check_count(prompts, "input_ids")
    for prompt in prompts:
        _check_ids(prompt, "input_ids", limits.vocab_size)
    return prompts, batch


def _encode(text: object, limits: ModelLimits) -> tuple[list[list[int]], bool]:
    texts: list[Any] = text if isinstance(text, list) else [text]
    if not texts or not all(isinstance(item, str) for item in texts):
        raise ApiError("text must be a string or a non-empty list of strings")
    _check_count(texts, "text")
    if limits.encode is None:
        raise ApiError("this engine has no tokenizer and cannot accept text prompts: send input_ids")
    longest = max(map(len, texts))
    if longest > limits.context_length * LONGEST_TOKEN:
        raise ApiError(f"a text of {longest} characters cannot fit the context of {limits.context_length} tokens")
    prompts = [limits.encode(item) for item in texts]
    if not all(prompts):
        raise ApiError("a text prompt encodes to no token")
    return prompts, isinstance(text, list)


def _check_count(prompts: list[Any], name: str) -> None:
    if len(prompts) > MAX_PROMPTS:
        raise ApiError(f"{name} holds {len(prompts)} sequences, a request may hold {MAX_PROMPTS}; send several")


def _check_ids(ids: object, name: str, vocab_size: int) -> None:
    if not isinstance(ids, list) or not ids:
        raise ApiError(f"{name} must be a non-empty list of token ids")
    try:
        # One conversion checks type and range of thousands of ids faster than a Python loop.
        array = np.array(ids)
    except ValueError as error:
        raise ApiError(f"{name} must be a flat list of token ids") from error
    if array.ndim != 1 or array.dtype.kind != "i":
        raise ApiError(f"{name} must be a flat list of integer token ids")
    if array.min() < 0 or array.max() >= vocab_size:
        bad = int(array[(array < 0) | (array >= vocab_size)][0])
        raise ApiError(f"{name} holds token id {bad}, outside the vocabulary [0, {vocab_size})")


def _rids(raw: object, count: int, batch: bool) -> list[str]:
    if raw is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(raw, str):
        return [f"{raw}_{index}" for index in range(count)] if batch else [raw]
    if not isinstance(raw, list) or not batch or len(raw) != count or not all(isinstance(r, str) for r in raw):
        raise ApiError(f"rid must be a string, or a list of {count} strings for a batch")
    if len(set(raw)) != count:
        raise ApiError(f"Duplicate request IDs detected within the request: {sorted(set(raw))}")
    return raw


def _logprob_spec(
    body: dict[str, Any], index: int, count: int, batch: bool, length: int, limits: ModelLimits
) -> LogprobSpec:
    place = (index, count, batch)
    if not _flag(_pick(body, "return_logprob", *place), "return_logprob"):
        return LogprobSpec()
    start = _integer(_pick(body, "logprob_start_len", *place), "logprob_start_len", -1, -1)
    if start > length:
        raise ApiError(f"logprob_start_len ({start}) is higher than the number of input tokens ({length})")
    return LogprobSpec(
        enabled=True,
        start=start,
        top=_integer(_pick(body, "top_logprobs_num", *place), "top_logprobs_num", 0, 0),
        ids=_chosen_ids(body.get("token_ids_logprob"), index, batch, limits.vocab_size),
        flat=_flag(body.get("return_flat_raw_top_logprobs"), "return_flat_raw_top_logprobs"),
        flat_b64=_flag(body.get("return_flat_raw_top_logprobs_b64"), "return_flat_raw_top_logprobs_b64"),
        text=_flag(body.get("return_text_in_logprobs"), "return_text_in_logprobs"),
    )


def _chosen_ids(raw: object, index: int, batch: bool, vocab_size: int) -> tuple[int, ...]:
    # One flat list serves every sequence of a batch; a list of lists has one for each.
    if batch and isinstance(raw, list) and raw and (raw[0] is None or isinstance(raw[0], list)):
        raw = raw[index] if index < len(raw) else None
    if raw is None or raw == []:
        return ()
    _check_ids(raw, "token_ids_logprob", vocab_size)
    return tuple(raw) if isinstance(raw, list) else ()


def _spread(body: dict[str, Any], key: str, count: int, batch: bool) -> list[Any]:
    value = body.get(key)
    if not isinstance(value, list):
        return [value] * count
    if not batch or len(value) != count:
        raise ApiError(f"{key} is a list of {len(value)} for {count} sequence(s)")
    return value


def _pick(body: dict[str, Any], key: str, index: int, count: int, batch: bool) -> Any:
    value = body.get(key)
    return _spread(body, key, count, batch)[index] if isinstance(value, list) else value


def _flag(value: object, name: str) -> bool:
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ApiError(f"{name} must be true or false, got {value!r}")
    return value


def _integer(value: object, name: str, default: int, minimum: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ApiError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return value
