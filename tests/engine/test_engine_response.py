"""JSON written by hand is JSON, and restores every float32."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from opd_async.actors.engine.batch import split_groups
from opd_async.actors.engine.request import LogprobSpec, Request
from opd_async.actors.engine.response import answer, event, triples
from opd_async.actors.engine.sampling import KNOWN_FIELDS, SamplingParams, parse_sampling_params

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FLOATS, st.integers(0, 200_000))))
def test_triples_restore_float32(entries: list[tuple[float, int]]) -> None:
    found = json.loads(triples([lp for lp, _ in entries], [i for _, i in entries]))
    assert [(np.float32(lp), i, text) for lp, i, text in found] == [(np.float32(lp), i, None) for lp, i in entries]
    assert all(isinstance(lp, float) for lp, _, _ in found)


def test_what_json_cannot_hold_becomes_null() -> None:
    values = [float("nan"), float("inf"), float("-inf"), -1.0]
    assert json.loads(triples(values, [1, 2, 3, 4])) == [
        [None, 1, None],
        [None, 2, None],
        [None, 3, None],
        [-1, 4, None],
    ]
    texts = {1: 'in"f', 2: "nan", 3: "\n", 4: ""}
    with_text = json.loads(triples(values, [1, 2, 3, 4], texts.__getitem__))
    assert [entry[2] for entry in with_text] == list(texts.values())
    assert [entry[0] for entry in with_text] == [None, None, None, -1]


def test_ids_and_texts_are_escaped() -> None:
    request = Request(rid='a"b\n', input_ids=[1], params=SamplingParams(), logprob=LogprobSpec(enabled=True))
    request.append(3, -0.5, 'v"1')
    request.finish({"type": "stop", "matched": 'q"'}, 'v"1')
    whole = json.loads(answer(request, 'say "hi"', None))
    assert (whole["text"], whole["meta_info"]["id"]) == ('say "hi"', 'a"b\n')
    sent = event(request, 0, 1, 'v"1', text=None, index=2, decode=None)
    assert sent.endswith(b"\n\n")
    piece = json.loads(sent.removeprefix(b"data: "))
    assert piece["index"] == 2
    assert piece["meta_info"]["weight_version"] == 'v"1'
    assert piece["meta_info"]["finish_reason"]["matched"] == 'q"'


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 100)), min_size=1, max_size=40), st.integers(0, 3000))
def test_groups_cover_everything_once_and_pad_less_than_splitting(sizes: list[tuple[int, int]], cost: int) -> None:
    ordered = sorted((count, count + prefix) for count, prefix in sizes)
    counts, kv_lens = [count for count, _ in ordered], [kv for _, kv in ordered]
    cuts = split_groups(counts, kv_lens, cost)
    assert [index for a, b in cuts for index in range(a, b)] == list(range(len(ordered)))
    padded = sum((b - a) * max(counts[a:b]) * max(kv_lens[a:b]) + cost for a, b in cuts)
    apart = sum(count * kv + cost for count, kv in ordered)
    assert padded <= apart


def test_sampling_defaults_are_the_documented_ones() -> None:
    assert parse_sampling_params(None) == parse_sampling_params(dict.fromkeys(KNOWN_FIELDS)) == SamplingParams()
    assert SamplingParams().max_new_tokens == 128
    assert parse_sampling_params({"temperature": 0.0}).greedy
    assert not parse_sampling_params({"temperature": 0.0, "top_p": 0.5}).filtered
    assert parse_sampling_params({"top_k": 3}).filtered
