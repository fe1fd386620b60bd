"""Answers of engines: what is right is read exactly, everything else is an `EngineError`."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.actors.client.replies import parse_delta, parse_scores
from opd_async.errors import EngineError
from opd_async.transport.messages import Finish

VOCAB = 50
IDS = np.array([3, 4, 5, 6], np.int32)

LOGPROB_FAULTS: list[tuple[Any, str]] = [
    ([None, 4, None], "null"),
    ([math.nan, 4, None], "finite"),
    (["nan", 4, None], "finite"),
    ([math.inf, 4, None], "finite"),
    ([-math.inf, 4, None], "finite"),
    ([-1e300, 4, None], "finite"),
    ([0.5, 4, None], "finite"),
    ([-1.0, 5, None], "ids differ"),
    ([-1.0, None, None], "null"),
    ([-1.0, math.inf, None], "null"),
    ([10**400, 4, None], "null"),
    ([-1.0], "null"),
    (["x", 4, None], "null"),
    ({"logprob": -1.0}, "null"),
    ("text", "null"),
    (-1.0, "null"),
    (None, "null"),
]


def event(**changes: Any) -> dict[str, Any]:
    """Two streamed tokens."""
    meta = {
        "output_token_logprobs": [[-0.5, 3, None], [-1.5, 4, None]],
        "finish_reason": None,
        "weight_version": "7",
    }
    top = {key: changes.pop(key) for key in ("output_ids", "error") if key in changes}
    return {"output_ids": [3, 4], "meta_info": meta | changes} | top


def reply(**changes: Any) -> dict[str, Any]:
    """The scores of IDS[2:], asked for from position 1."""
    entries = [[None, 4, None], [-0.5, 5, None], [-1.5, 6, None]]
    return {"meta_info": {"input_token_logprobs": entries, "prompt_tokens": 4, "cached_tokens": 1} | changes}


# --- streams ---------------------------------------------------------------------------------------------------------


def test_new_tokens_are_read() -> None:
    delta = parse_delta(event(), VOCAB)
    assert (delta.token_ids.dtype, delta.logprobs.dtype) == (np.int32, np.float32)
    assert (delta.token_ids.tolist(), delta.logprobs.tolist()) == ([3, 4], [-0.5, -1.5])
    assert (delta.weight_version, delta.finish, delta.aborted) == ("7", None, False)


@pytest.mark.parametrize(
    ("reason", "finish", "aborted"),
    [
        (None, None, False),
        ({"type": "stop", "matched": 2}, Finish.STOP, False),
        ({"type": "length", "length": 9}, Finish.LENGTH, False),
        ({"type": "abort", "message": "x"}, None, True),
    ],
)
def test_ends_are_told_apart(reason: Any, finish: Finish | None, aborted: bool) -> None:
    delta = parse_delta(event(finish_reason=reason), VOCAB)
    assert (delta.finish, delta.aborted) == (finish, aborted)


def test_an_event_may_be_empty() -> None:
    delta = parse_delta(event(output_ids=[], output_token_logprobs=[], finish_reason={"type": "stop"}), VOCAB)
    assert (len(delta.token_ids), len(delta.logprobs), delta.finish) == (0, 0, Finish.STOP)


def test_rounding_above_zero_is_taken_for_zero() -> None:
    delta = parse_delta(event(output_token_logprobs=[[1e-6, 3, None], [-0.0, 4, None]]), VOCAB)
    assert delta.logprobs.max() <= 0.0


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (None, "not a JSON object"),
        ([], "not a JSON object"),
        ({}, "missing"),
        ({"output_ids": [1]}, "missing"),
        (event(error={"message": "out of memory"}), "out of memory"),
        (event(error="bad request"), "bad request"),
        (event(output_ids=None), "missing"),
        (event(output_ids=[3, "4"]), "missing"),
        (event(output_ids=[3, True]), "missing"),
        (event(output_ids=[3, 4.0]), "missing"),
        (event(output_ids=[3, VOCAB]), "outside the vocabulary"),
        (event(output_ids=[3, -1]), "outside the vocabulary"),
        (event(output_ids=[3]), "one entry per token"),
        (event(output_token_logprobs=None), "missing"),
        (event(output_token_logprobs=[[-0.5, 3, None]]), "one entry per token"),
        (event(finish_reason={"type": "tired"}), "tired"),
        (event(finish_reason={"type": []}), "unknown type"),
    ],
)
def test_broken_events_are_refused(broken: Any, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        parse_delta(broken, VOCAB)


@pytest.mark.parametrize(("entry", "text"), LOGPROB_FAULTS)
def test_broken_behaviour_logprobs_are_refused(entry: Any, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        parse_delta(event(output_token_logprobs=[[-0.5, 3, None], entry]), VOCAB)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_skip_the_entry_of_the_position_before() -> None:
    scores = parse_scores(reply(), IDS, 2, VOCAB)
    assert scores.logprobs.dtype == np.float32
    assert scores.logprobs.tolist() == [-0.5, -1.5]
    assert (scores.prompt_tokens, scores.cached_tokens) == (4, 1)


def test_the_last_id_of_the_vocabulary_may_be_reported_as_zero() -> None:
    entries = [[None, 4, None], [-0.5, 0, None], [-1.5, 6, None]]
    ids = np.array([3, 4, VOCAB - 1, 6], np.int32)
    assert parse_scores(reply(input_token_logprobs=entries), ids, 2, VOCAB).logprobs.tolist() == [-0.5, -1.5]
    with pytest.raises(EngineError, match="ids differ"):
        parse_scores(reply(input_token_logprobs=entries), IDS, 2, VOCAB)
    # the last id is that of the engine's model, not that of the student
    with pytest.raises(EngineError, match="ids differ"):
        parse_scores(reply(input_token_logprobs=entries), ids, 2, VOCAB, rows=VOCAB + 1)
    ids[2] = VOCAB
    assert parse_scores(reply(input_token_logprobs=entries), ids, 2, VOCAB, rows=VOCAB + 1).logprobs[0] == -0.5


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (None, "meta_info"),
        ([], "meta_info"),
        ({"meta_info": 3}, "meta_info"),
        (reply(input_token_logprobs=None), "wrong length"),
        (reply(input_token_logprobs=[[None, 4, None], [-0.5, 5, None]]), "wrong length"),
        (reply(input_token_logprobs=[[None, 4, None]] * 4), "wrong length"),
        (reply(prompt_tokens=None), "prompt_tokens"),
        (reply(cached_tokens="1"), "cached_tokens"),
    ],
)
def test_broken_replies_are_refused(broken: Any, text: str) -> None:
    with pytest.raises(EngineError, match=text):
        parse_scores(broken, IDS, 2, VOCAB)


@pytest.mark.parametrize(("entry", "text"), LOGPROB_FAULTS)
def test_broken_teacher_logprobs_are_refused(entry: Any, text: str) -> None:
    ids = np.array([3, 9, 4, 6], np.int32)
    entries = [[None, 9, None], entry, [-1.5, 6, None]]
    with pytest.raises(EngineError, match=text):
        parse_scores(reply(input_token_logprobs=entries), ids, 2, VOCAB)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["output_ids", "output_token_logprobs", "finish_reason", "input_token_logprobs", "cached_tokens", "weight_version"]
)


@settings(max_examples=300, deadline=None)
@given(JSON, FIELDS)
def test_whatever_json_an_engine_answers(value: Any, field: str) -> None:
    value = json.loads(json.dumps(value))
    for parse in (
        lambda: parse_delta(value, VOCAB),
        lambda: parse_delta(event(**{field: value}), VOCAB),
        lambda: parse_delta(event(output_token_logprobs=[[-0.5, 3, None], value]), VOCAB),
        lambda: parse_scores(value, IDS, 2, VOCAB),
        lambda: parse_scores(reply(**{field: value}), IDS, 2, VOCAB),
        lambda: parse_scores(reply(input_token_logprobs=[None, [value, 5], [-1.5, value]]), IDS, 2, VOCAB),
    ):
        try:
            parsed = parse()
        except EngineError:
            continue
        assert np.isfinite(parsed.logprobs).all()
        assert (parsed.logprobs <= 0).all()
