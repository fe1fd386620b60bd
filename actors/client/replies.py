"""Checks on what engines answer: nothing malformed gets past this module.

Pure functions over decoded JSON. Each raises `EngineError` that names the field; callers count it and ask again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.client.topk_replies import parse_topk
from opd_async.errors import EngineError, EngineFault
from opd_async.estimators.topk import TopK
from opd_async.transport.messages import Finish

MAX_LOGPROB = 1e-3
"""Rounding may lift a logprob of nearly certain tokens a little above zero."""
MAX_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of a stream: `token_ids` int32[n], `logprobs` float32[n] (nats), all made by `weight_version`.

    Or tokens that were given and not `sampled`: they have no logprobs, and came while the engines held that version.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    weight_version: str
    finish: Finish | None
    aborted: bool
    _: KW_ONLY
    sampled: bool = True


@dataclass(frozen=True, slots=True)
class Scores:
    """Teacher logprobs float32[n] of the n tokens asked for, and how much of the request came from the cache; `topk`
    of n rows where it was asked for."""

    logprobs: NDArray[np.float32]
    prompt_tokens: int
    cached_tokens: int
    topk: TopK | None = None
    weight_version: str = ""
    """Of the engine's weights when it had computed them."""


def _logprobs(entries: Sequence[Any], ids: Sequence[int], last_id: int, where: str) -> NDArray[np.float32]:
    """float32[n] of [logprob, id, text] entries. SGLang reports `last_id` (vocabulary size - 1) as 0 in prompts."""
    values = _plain(entries, ids)
    if values is None:
        values = _checked(entries, ids, last_id, where)
    # the lower limit keeps it finite as float32, and NaN fails both comparisons
    if not ((values >= -MAX_FLOAT32) & (values <= MAX_LOGPROB)).all():
        raise EngineError(f"{where}: a logprob is not a finite number <= 0")
    return np.minimum(values, 0.0).astype(np.float32)


def _plain(entries: Sequence[Any], ids: Sequence[int]) -> NDArray[np.float64] | None:
    """The logprobs where every entry is what it should be, without a loop in Python; None: look at them one by one."""
    try:
        if [entry[1] for entry in entries] != ids:
            return None
        values = np.array([entry[0] for entry in entries], np.float64)
    except (TypeError, ValueError, LookupError, OverflowError):
        return None
    # null becomes NaN here
    return None if values.ndim != 1 or np.isnan(values).any() else values


def _checked(entries: Sequence[Any], ids: Sequence[int], last_id: int, where: str) -> NDArray[np.float64]:
    """The same for entries that are not plain; says what is wrong with the first that cannot be used."""
    try:
        pairs = [(float(entry[0]), int(entry[1])) for entry in entries]
    except (TypeError, ValueError, LookupError, OverflowError):
        raise EngineError(f"{where}: an entry is not [logprob, id, text]: null or wrong type") from None
    if any(got != want and not (want == last_id and got == 0) for (_, got), want in zip(pairs, ids, strict=True)):
        raise EngineError(f"{where}: token ids differ from those of the request")
    return np.array([logprob for logprob, _ in pairs], np.float64)


def fault_of_status(status: int) -> EngineFault:
    """What an HTTP status, or the code in an error that came with status 200, says about trying again."""
    if status in (408, 429, 503):
        return EngineFault.BUSY
    return EngineFault.REFUSED if 400 <= status < 500 else EngineFault.FAILED


def error_in(reply: Any) -> EngineError | None:
    """The error that an engine reports as an answer (`{"error": {"message", "code"}}`, or a text), if it is one.

    SGLang does so with HTTP status 200 in streams, and older versions without a code.
    """
    if not isinstance(reply, dict) or "error" not in reply:
        return None
    error = reply["error"]
    code = error.get("code") if isinstance(error, dict) else None
    message = error.get("message", error) if isinstance(error, dict) else error
    fault = fault_of_status(code) if type(code) is int else EngineFault.FAILED
    return EngineError(f"the engine reports an error: {message}", fault)


def _aborted(meta: dict[str, Any]) -> EngineError | None:
    """A scoring request that the engine gave up."""
    reason = meta.get("finish_reason")
    if not isinstance(reason, dict) or reason.get("type") != "abort":
        return None
    status = reason.get("status_code")
    fault = fault_of_status(status) if type(status) is int else EngineFault.ABORTED
    return EngineError(f"the engine aborted the request: {reason.get('message')}", fault)


def parse_delta(event: Any, vocab_size: int) -> Delta:
    """One streamed event of `/generate` (incremental streaming)."""
    if not isinstance(event, dict):
        raise EngineError("event: not a JSON object")
    if error := error_in(event):
        raise error
    meta = event.get("meta_info")
    ids = event.get("output_ids")
    if not isinstance(meta, dict) or not isinstance(ids, list) or set(map(type, ids)) - {int}:
        raise EngineError("event: meta_info or output_ids is missing")
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise EngineError("output_ids: an id outside the vocabulary")
    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list) or len(entries) != len(ids):
        raise EngineError("output_token_logprobs: missing, or not one entry per token")
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind not in (None, "stop", "length", "abort"):
        raise EngineError(f"finish_reason: unknown type {kind!r}")
    return Delta(
        np.array(ids, np.int32),
        _logprobs(entries, ids, -1, "output_token_logprobs"),
        str(meta.get("weight_version")),
        Finish(kind) if kind in ("stop", "length") else None,
        kind == "abort",
    )


def parse_scores(
    reply: Any, ids: NDArray[np.int32], start: int, vocab_size: int, topk: int = 0, *, rows: int = 0
) -> Scores:
    """One entry of a prefill-only answer that was asked with `logprob_start_len = start - 1`.

    `ids` int32[N] is what was sent; the scores are those of `ids[start:]`, with the `topk` most likely tokens if any.
    The engine's model has `rows` ids (0: `vocab_size`); those at or beyond `vocab_size` leave the top-k.
    """
    if error := error_in(reply):
        raise error
    meta = reply.get("meta_info") if isinstance(reply, dict) else None
    if not isinstance(meta, dict):
        raise EngineError("reply: meta_info is missing")
    if error := _aborted(meta):
        raise error
    entries = meta.get("input_token_logprobs")
    if not isinstance(entries, list) or len(entries) != len(ids) - start + 1:
        raise EngineError("input_token_logprobs: missing or of the wrong length")
    prompt_tokens, cached_tokens = meta.get("prompt_tokens"), meta.get("cached_tokens")
    if type(prompt_tokens) is not int or type(cached_tokens) is not int:
        raise EngineError("prompt_tokens or cached_tokens: missing")
    rows = max(rows, vocab_size)
    logprobs = _logprobs(entries[1:], ids[start:].tolist(), rows - 1, "input_token_logprobs")
    found = parse_topk(meta, ids[start:], logprobs, topk, rows).below(vocab_size) if topk else None
    return Scores(logprobs, prompt_tokens, cached_tokens, found, str(meta.get("weight_version")))
