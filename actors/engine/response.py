"""JSON of /generate answers and stream events, written straight from arrays.

Every logprob entry is SGLang's triple `[logprob, token id, text or null]`. Floats are printed with nine significant
digits, which restores a float32 exactly; NaN and infinities become null.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np

from opd_async.actors.engine.request import FloatArray, Request, TopRows

_NOT_JSON = re.compile(r"-?(?:nan|inf)")
Decode = Callable[[int], str]


def answer(request: Request, text: str | None, decode: Decode | None) -> str:
    """The whole answer to a request that has finished, as a JSON object."""
    assert request.finish_reason is not None
    meta = _meta(request, len(request.output_ids), request.finish_version, True)
    if request.logprob.enabled:
        meta += _input_part(request, decode) + _output_part(request, 0, len(request.output_ids), True, decode)
    return _body(text, request.output_ids, meta)


def event(
    request: Request, low: int, high: int, version: str, *, text: str | None, index: int | None, decode: Decode | None
) -> bytes:
    """One stream event with response tokens [low, high), all sampled under `version`. Ends with a blank line.

    It carries the finish reason when nothing comes after it.
    """
    final = request.finished and high == len(request.output_ids)
    meta = _meta(request, high, version, final)
    if request.logprob.enabled:
        meta += _input_part(request, decode) + _output_part(request, low, high, final, decode)
    body = _body(text, request.output_ids[low:high], meta)
    if index is not None:
        body = f'{body[:-1]},"index":{index}}}'
    return f"data: {body}\n\n".encode()


def triples(logprobs: Sequence[float], ids: Sequence[int], decode: Decode | None = None) -> str:
    """`[[logprob, id, null], ...]`; with `decode` the null becomes the token's text."""
    count = len(ids)
    if not count:
        return "[]"
    if decode is not None:
        pairs = zip(logprobs, ids, strict=True)
        return "[" + ",".join(f"[{_finite(f'{lp:.8e}')},{i},{json.dumps(decode(i))}]" for lp, i in pairs) + "]"
    # One C-level formatting call for the whole list: most of an answer's bytes are these.
    pattern = "[" + ("[%.8e,%d,null]," * count)[:-1] + "]"
    return _finite(pattern % tuple(chain.from_iterable(zip(logprobs, ids, strict=True))))


def _finite(text: str) -> str:
    return _NOT_JSON.sub("null", text) if "nan" in text or "inf" in text else text


def _body(text: str | None, ids: list[int], meta: str) -> str:
    head = "" if text is None else f'"text":{json.dumps(text)},'
    return f'{{{head}"output_ids":{json.dumps(ids, separators=(",", ":"))},"meta_info":{{{meta}}}}}'


def _meta(request: Request, completion: int, version: str, final: bool) -> str:
    reason = json.dumps(request.finish_reason) if final else "null"
    meta = f'"id":{json.dumps(request.rid)},"finish_reason":{reason},"completion_tokens":{completion},'
    # SGLang omits these for a request that was aborted before it was ever admitted.
    if request.cached_tokens is not None:
        cached = request.cached_tokens
        meta += (
            f'"prompt_tokens":{len(request.input_ids)},"cached_tokens":{cached},'
            f'"cached_tokens_details":{{"device":{cached},"host":0}},'
        )
    meta += (
        f'"reasoning_tokens":0,"num_retractions":{request.num_retractions},"dp_rank":null,'
        f'"weight_version":{json.dumps(version)}'
    )
    if final:
        spans = [{"version": span.version, "start": span.start, "end": span.end} for span in request.versions]
        latency = time.monotonic() - request.created
        meta += f',"weight_versions":{json.dumps(spans)},"e2e_latency":{latency:.6f}'
    return meta


def _input_part(request: Request, decode: Decode | None) -> str:
    spec = request.logprob
    # -1 means no prompt logprobs since SGLang 0.5.10.
    scored = request.input_ids[spec.start :] if spec.start >= 0 else []
    # A request that was aborted before its prompt was done has fewer logprobs than prompt tokens.
    logprobs = list(chain.from_iterable(part.tolist() for part in request.input_logprobs))
    scored = scored[: len(logprobs) + 1] if request.prompt_done or logprobs else []
    part = f',"input_token_logprobs":{_with_null_first(scored, logprobs, decode)}'
    if spec.top:
        part += _input_top(request, bool(scored), decode)
    if spec.ids:
        rows = (triples(row, spec.ids, decode) for block in request.input_ids_logprobs for row in block.tolist())
        part += f',"input_token_ids_logprobs":{_null_rows(bool(scored), rows)}'
    return part


def _with_null_first(scored: list[int], logprobs: list[float], decode: Decode | None) -> str:
    if not scored:
        return "[]"
    text = "null" if decode is None else json.dumps(decode(scored[0]))
    rest = triples(logprobs, scored[1:], decode)
    first = f"[null,{scored[0]},{text}]"
    return f"[{first}]" if rest == "[]" else f"[{first},{rest[1:]}"


def _input_top(request: Request, present: bool, decode: Decode | None) -> str:
    spec = request.logprob
    if spec.flat and present:
        return _flat_top(request.input_top, spec.top, spec.flat_b64)
    return f',"input_top_logprobs":{_null_rows(present, _top_rows(request.input_top, decode))}'


def _flat_top(blocks: list[TopRows], k: int, as_b64: bool) -> str:
    """Top-k rows as two flat arrays; the null first row is only announced."""
    parts = blocks or [(np.empty((0, k), np.float32), np.empty((0, k), np.int64))]
    values: FloatArray = np.concatenate([part[0] for part in parts])
    ids = np.concatenate([part[1] for part in parts])
    rows, k = values.shape
    name = "input_top_logprobs"
    tail = f',"{name}_shape":[{rows},{k}],"{name}_null_prefix":1'
    if as_b64:
        val = base64.b64encode(values.astype("<f4").tobytes()).decode()
        idx = base64.b64encode(ids.astype("<i4").tobytes()).decode()
        kinds = f'"{name}_val_flat_b64_dtype":"float32","{name}_idx_flat_b64_dtype":"int32"'
        return f',"{name}_val_flat_b64":"{val}","{name}_idx_flat_b64":"{idx}",{kinds}{tail}'
    val = _finite("[" + ",".join(f"{value:.8e}" for value in values.ravel().tolist()) + "]")
    return f',"{name}_val_flat":{val},"{name}_idx_flat":{json.dumps(ids.ravel().tolist())}{tail}'


def _top_rows(blocks: list[TopRows], decode: Decode | None) -> Iterable[str]:
    for values, ids in blocks:
        for row_values, row_ids in zip(values.tolist(), ids.tolist(), strict=True):
            yield triples(row_values, row_ids, decode)


def _null_rows(present: bool, rows: Iterable[str]) -> str:
    return "[" + ",".join(chain(["null"], rows)) + "]" if present else "[]"


def _output_part(request: Request, low: int, high: int, final: bool, decode: Decode | None) -> str:
    spec = request.logprob
    part = (
        f',"output_token_logprobs":'
        f"{triples(request.output_logprobs[low:high], request.output_ids[low:high], decode)}"
        f',"output_token_logprobs_length":{high}'
    )
    # A scoring request samples nothing, yet reports the distribution after its last token.
    end = len(request.output_top) if final and request.prefill_only else high
    if spec.top:
        part += f',"output_top_logprobs":[{",".join(_top_rows(request.output_top[low:end], decode))}]'
    end = len(request.output_ids_logprobs) if final and request.prefill_only else high
    if spec.ids:
        rows = (triples(row.tolist(), spec.ids, decode) for row in request.output_ids_logprobs[low:end])
        part += f',"output_token_ids_logprobs":[{",".join(rows)}]'
    return part
