"""The teacher's top-k in a prefill-only answer: flat base64 where the server has it, nested lists otherwise.

Both forms cover the same positions: a null for the first, then one row of k entries per scored token, which is the
distribution that predicts that token. What does not add up is an `EngineError` that names the field.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_async.errors import EngineError
from opd_async.estimators.topk import TopK

NAME = "input_top_logprobs"
AGREEMENT = 1e-2
"""Nats by which a token's own logprob may differ from its entry in the top-k; both come from one row of logits."""


def request_fields(topk: int) -> dict[str, Any]:
    """What a scoring request must say to be answered with the top-k; nothing if none is wanted."""
    if not topk:
        return {}
    return {
        "top_logprobs_num": topk,
        # servers that do not know the flat form ignore these and answer with nested lists
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
    }


def parse_topk(
    meta: dict[str, Any], targets: NDArray[np.int32], logprobs: NDArray[np.float32], k: int, vocab_size: int
) -> TopK:
    """The k most likely tokens for each of the n scored tokens `targets` int32[n], whose own logprobs are float32[n].

    Raises `EngineError` for missing or malformed arrays, ids outside the vocabulary, numbers that are no top of a
    distribution, and rows that contradict the logprob of their token (those of other positions, say).
    """
    topk = _flat(meta, len(targets), k) if f"{NAME}_val_flat_b64" in meta else _nested(meta, len(targets), k)
    if topk.ids.size and int(topk.ids.min()) < 0:
        raise EngineError(f"{NAME}: an id is negative")
    if problem := topk.problem():
        raise EngineError(f"{NAME}: {problem}")
    if topk.ids.size and int(topk.ids.max()) >= vocab_size:
        raise EngineError(f"{NAME}: an id outside the vocabulary")
    _check_targets(topk, targets, logprobs)
    return TopK(topk.ids, np.minimum(topk.logprobs, np.float32(0.0)))


def _flat(meta: dict[str, Any], n: int, k: int) -> TopK:
    if meta.get(f"{NAME}_shape") != [n, k] or meta.get(f"{NAME}_null_prefix") != 1:
        raise EngineError(f"{NAME}_shape: not [{n}, {k}] behind one null")
    return TopK(_array(meta, "idx", np.dtype("<i4"), n, k), _array(meta, "val", np.dtype("<f4"), n, k))


def _array(meta: dict[str, Any], part: str, dtype: np.dtype[Any], n: int, k: int) -> NDArray[Any]:
    field = f"{NAME}_{part}_flat_b64"
    if meta.get(f"{field}_dtype") != dtype.name:
        raise EngineError(f"{field}_dtype: {meta.get(f'{field}_dtype')!r:.40} where {dtype.name} belongs")
    try:
        data = base64.b64decode(meta[field], validate=True)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise EngineError(f"{field}: not base64") from None
    if len(data) != n * k * dtype.itemsize:
        raise EngineError(f"{field}: {len(data)} bytes where {n * k * dtype.itemsize} belong")
    return np.frombuffer(data, dtype).reshape(n, k)


def _nested(meta: dict[str, Any], n: int, k: int) -> TopK:
    rows = meta.get(NAME)
    if not isinstance(rows, list) or len(rows) != n + 1:
        raise EngineError(f"{NAME}: missing or of the wrong length")
    if any(not isinstance(row, list) or len(row) != k for row in rows[1:]):
        raise EngineError(f"{NAME}: a row does not hold {k} entries")
    try:
        ids = [[int(entry[1]) for entry in row] for row in rows[1:]]
        values = [[float(entry[0]) for entry in row] for row in rows[1:]]
        with np.errstate(over="ignore"):  # what overflows is infinite, which is refused with all that is not finite
            return TopK(np.array(ids, np.int32).reshape(n, k), np.array(values, np.float32).reshape(n, k))
    except (TypeError, ValueError, LookupError, OverflowError):
        raise EngineError(f"{NAME}: an entry is not [logprob, id, text]: null or wrong type") from None


def _check_targets(topk: TopK, targets: NDArray[np.int32], logprobs: NDArray[np.float32]) -> None:
    """A scored token has the same logprob in its row; if it is not there, it is no likelier than the last that is."""
    match = topk.ids == targets[:, None]
    inside = match.any(1)
    entries = np.where(match, topk.logprobs, 0.0).sum(1)
    if not np.allclose(entries[inside], logprobs[inside], rtol=1e-3, atol=AGREEMENT):
        raise EngineError(f"{NAME}: a token's logprob differs from its entry in input_token_logprobs")
    if topk.ids.size and (logprobs > topk.logprobs.min(1) + AGREEMENT)[~inside].any():
        raise EngineError(f"{NAME}: a token that is not in the top-k is likelier than one that is")
