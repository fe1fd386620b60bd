"""The teacher's top-k in scoring answers: both forms are read alike, whatever does not add up is an `EngineError`."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.actors.client.replies import parse_scores
from opd_async.actors.client.topk_replies import NAME, parse_topk, request_fields
from opd_async.errors import EngineError
from opd_async.estimators.topk import TopK

VOCAB, K = 50, 3
IDS = np.array([3, 4, 5, 6, 7], np.int32)
START = 2
OWN = np.log(np.array([0.5, 0.01, 0.2], np.float32))
TOP_IDS = np.array([[5, 1, 2], [9, 8, 49], [0, 7, 3]], np.int32)
TOP = np.log(np.array([[0.5, 0.3, 0.1], [0.6, 0.2, 0.1], [0.4, 0.2, 0.1]], np.float32))


def reply(**changes: Any) -> dict[str, Any]:
    """The scores of IDS[2:], without the top-k."""
    entries = [[None, 4, None], *([float(own), int(i), None] for own, i in zip(OWN, IDS[START:], strict=True))]
    return {"meta_info": {"input_token_logprobs": entries, "prompt_tokens": 5, "cached_tokens": 1} | changes}


def nested(ids: Any = TOP_IDS, values: Any = TOP) -> dict[str, Any]:
    rows = [[[float(v), int(i), None] for v, i in zip(*row, strict=True)] for row in zip(values, ids, strict=True)]
    return {NAME: [None, *rows]}


def flat(ids: Any = TOP_IDS, values: Any = TOP, **changes: Any) -> dict[str, Any]:
    fields = {
        f"{NAME}_val_flat_b64": base64.b64encode(np.asarray(values, "<f4").tobytes()).decode(),
        f"{NAME}_idx_flat_b64": base64.b64encode(np.asarray(ids, "<i4").tobytes()).decode(),
        f"{NAME}_val_flat_b64_dtype": "float32",
        f"{NAME}_idx_flat_b64_dtype": "int32",
        f"{NAME}_shape": list(np.shape(ids)),
        f"{NAME}_null_prefix": 1,
    }
    return fields | {f"{NAME}_{key}": value for key, value in changes.items()}


def parse(fields: dict[str, Any]) -> TopK:
    scores = parse_scores(json.loads(json.dumps(reply(**fields))), IDS, START, VOCAB, K)
    assert scores.topk is not None
    return scores.topk


@pytest.mark.parametrize("form", [nested, flat])
def test_both_forms_are_read(form: Callable[[], dict[str, Any]]) -> None:
    topk = parse(form())
    assert (topk.ids.dtype, topk.logprobs.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(topk.ids, TOP_IDS)
    np.testing.assert_allclose(topk.logprobs, TOP, rtol=1e-6)


@pytest.mark.parametrize("form", [nested, flat])
def test_ids_that_the_student_has_not_leave_their_places(form: Callable[..., dict[str, Any]]) -> None:
    """A teacher of 60 ids, a student of 50: what is dropped keeps no probability, and the others are as they were."""
    ids = changed(changed(TOP_IDS, 1, 0, 59), 1, 2, 50)
    scores = parse_scores(json.loads(json.dumps(reply(**form(ids)))), IDS, START, VOCAB, K, rows=60)
    assert scores.topk is not None and scores.topk.problem() is None
    np.testing.assert_array_equal(scores.topk.ids, [[5, 1, 2], [-1, 8, -1], [0, 7, 3]])
    expected = changed(changed(TOP, 1, 0, -1e4), 1, 2, -1e4)
    np.testing.assert_allclose(scores.topk.logprobs, expected, rtol=1e-6)
    assert (scores.topk.ids.dtype, scores.topk.logprobs.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(scores.logprobs, OWN)
    with pytest.raises(EngineError, match="outside the vocabulary"):
        parse_scores(reply(**form(changed(TOP_IDS, 1, 0, 60))), IDS, START, VOCAB, K, rows=60)


def test_places_without_a_token() -> None:
    ids, logprobs = np.array([[-1, 3, -1]], np.int32), np.array([[-1e4, -0.5, -1e4]], np.float32)
    assert TopK(ids, logprobs).problem() is None
    assert (
        TopK(ids, changed(logprobs, 0, 2, -2.0)).problem() == "a place without a token has another logprob than -10000"
    )
    assert TopK(changed(ids, 0, 0, -2), logprobs).problem() == "an id is negative or comes twice in a row"
    assert TopK(changed(ids, 0, 0, 3), logprobs).problem() == "an id is negative or comes twice in a row"
    whole = TopK(TOP_IDS, TOP)
    assert whole.below(VOCAB) is whole and whole.below(1).ids.tolist() == [[-1] * 3, [-1] * 3, [0, -1, -1]]
    assert whole.below(1).problem() is None


def test_one_row_that_cannot_be_is_enough() -> None:
    good = np.log(np.array([[0.5, 0.3], [0.6, 0.4], [0.1, 0.1]], np.float32))
    ids = np.array([[0, 1], [2, 3], [4, 5]], np.int32)
    assert TopK(ids, good).problem() is None
    for row in range(3):
        whole = changed(changed(good, row, 0, math.log(0.7)), row, 1, math.log(0.4))
        assert TopK(ids, whole).problem() == "the probabilities of a row add up to more than one"
        assert TopK(ids, changed(good, row, 1, math.nan)).problem() == "a logprob is not a finite number <= 0"
        assert TopK(ids, changed(good, row, 1, 0.2)).problem() == "a logprob is not a finite number <= 0"
        twice = changed(ids, row, 1, int(ids[row, 0]))
        assert TopK(twice, good).problem() == "an id is negative or comes twice in a row"


def test_an_id_may_come_again_in_the_next_row() -> None:
    """The largest of one row is the smallest of the next; a row that is short of tokens says so more than once."""
    ids = np.array([[1, 9, 4], [9, 30, 12], [-1, 30, -1], [30, 2, 31]], np.int32)
    logprobs = np.where(ids == -1, -1e4, -2.0).astype(np.float32)
    assert TopK(ids, logprobs).problem() is None
    for row in range(4):
        twice = changed(ids, row, 0, 30 if row else 4)
        twice = changed(twice, row, 2, 30 if row else 4)
        known = np.where(twice == -1, -1e4, -2.0).astype(np.float32)
        assert TopK(twice, known).problem() == "an id is negative or comes twice in a row"


def test_nothing_is_asked_for_or_read_without_need() -> None:
    assert request_fields(0) == {}
    assert request_fields(64)["top_logprobs_num"] == 64
    assert parse_scores(reply(**nested()), IDS, START, VOCAB).topk is None


def test_rounding_above_zero_is_taken_for_zero() -> None:
    values = np.array([[1e-5, -30.0, -31.0]], np.float32)
    topk = parse_topk(flat(TOP_IDS[:1], values), IDS[2:3], values[0, :1], K, VOCAB)
    assert topk.logprobs.max() == 0.0


def changed(array: Any, row: int, column: int, value: float) -> Any:
    copy = array.copy()
    copy[row, column] = value
    return copy


FAULTS: list[tuple[Callable[..., dict[str, Any]], dict[str, Any], str]] = [
    (form, fields, text)
    for form in (nested, flat)
    for fields, text in (
        ({"ids": changed(TOP_IDS, 1, 0, VOCAB)}, "outside the vocabulary"),
        ({"ids": changed(TOP_IDS, 1, 0, -1)}, "negative"),
        ({"ids": changed(TOP_IDS, 1, 0, 8)}, "twice"),
        ({"values": changed(TOP, 1, 2, np.nan)}, "finite"),
        ({"values": changed(TOP, 1, 2, -np.inf)}, "finite"),
        ({"values": changed(TOP, 1, 2, 0.5)}, "finite"),
        ({"values": np.zeros_like(TOP)}, "more than one"),
        ({"values": changed(TOP, 0, 0, -0.9)}, "differs from its entry"),
        ({"ids": np.roll(TOP_IDS, 1, 0), "values": np.roll(TOP, 1, 0)}, "differs from its entry|likelier than one"),
        ({"values": changed(TOP, 1, 2, -9.0)}, "likelier than one"),
        ({"ids": TOP_IDS[:2], "values": TOP[:2]}, "wrong length|shape"),
        ({"ids": TOP_IDS[:, :2], "values": TOP[:, :2]}, "3 entries|shape"),
    )
]


@pytest.mark.parametrize(("form", "fields", "text"), FAULTS)
def test_what_is_no_top_of_a_distribution_is_refused(form: Any, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        parse(form(**fields))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "missing"),
        ({NAME: None}, "missing"),
        ({NAME: [None, None, *nested()[NAME][2:]]}, "3 entries"),
        ({NAME: [None, [1, 2, 3], *nested()[NAME][2:]]}, "null or wrong type"),
        (
            {NAME: [None, [[None, 5, None], [-2.0, 1, None], [-3.0, 2, None]], *nested()[NAME][2:]]},
            "null or wrong type",
        ),
        ({NAME: [None, [[-1.0, 2**40, None]] * 3, *nested()[NAME][2:]]}, "null or wrong type"),
        (flat(shape=[3, 4]), "shape"),
        (flat(shape=None), "shape"),
        (flat(null_prefix=0), "shape"),
        (flat(val_flat_b64_dtype="float16"), "float16"),
        (flat(idx_flat_b64_dtype=None), "int32 belongs"),
        (flat(val_flat_b64="!!"), "not base64"),
        (flat(idx_flat_b64=7), "not base64"),
        (flat(idx_flat_b64="AAAA"), "3 bytes where 36 belong"),
    ],
)
def test_malformed_answers_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(EngineError, match=text):
        parse(fields)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(JSON, st.sampled_from(sorted(flat())))
def test_whatever_json_an_engine_answers(value: Any, field: str) -> None:
    value = json.loads(json.dumps(value))
    for meta in ({NAME: value}, {NAME: [None, value, value, value]}, flat() | {field: value}):
        try:
            topk = parse_topk(meta, IDS[START:], OWN, K, VOCAB)
        except EngineError:
            continue
        assert topk.problem() is None and topk.ids.shape == (3, K)
