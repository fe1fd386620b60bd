"""Streams come whole whichever way the server sends them, and what is missing or relabelled is noticed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.actors.client.stream_cursor import StreamCursor
from opd_async.errors import EngineError

IDS = list(range(100, 130))


def event(ids: list[int], total: int, version: str = "3", spans: list[tuple[str, int, int]] | None = None) -> Any:
    """An event as servers send it; a token's logprob is minus its id."""
    meta: dict[str, Any] = {
        "completion_tokens": total,
        "weight_version": version,
        "output_token_logprobs": [[-float(i), i, None] for i in ids],
    }
    if spans is not None:
        meta["weight_versions"] = [{"version": v, "start": start, "end": end} for v, start, end in spans]
    return {"output_ids": ids, "meta_info": meta}


def read(*events: Any) -> list[int]:
    """All tokens of a stream; each comes with its own logprob."""
    cursor, found = StreamCursor(), []
    for each in events:
        part = cursor.new_part(each)
        logprobs = [entry[0] for entry in part["meta_info"]["output_token_logprobs"]]
        assert logprobs == [-float(i) for i in part["output_ids"]]
        found += part["output_ids"]
    assert cursor.received == len(found)
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(IDS)), min_size=1, max_size=12), st.booleans())
def test_every_token_comes_once(ends: list[int], cumulative: bool) -> None:
    """A cumulative stream may skip events; any event may bring nothing new."""
    ends = sorted(ends)
    starts = [0] * len(ends) if cumulative else [0, *ends[:-1]]
    assert read(*(event(IDS[start:end], end) for start, end in zip(starts, ends, strict=True))) == IDS[: ends[-1]]


def test_the_end_of_a_request_that_waited_repeats_a_token() -> None:
    assert read(event(IDS[:4], 4), event(IDS[3:4], 4)) == IDS[:4]
    assert read(event(IDS[:1], 1), event(IDS[:1], 1)) == IDS[:1]


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([event(IDS[:2], 2), event(IDS[3:4], 4)], "some are lost"),
        ([event(IDS[:4], 4), event(IDS[:3], 3)], "some are lost"),
        ([{"output_ids": [1], "meta_info": {}}], "completion_tokens: missing"),
        ([event(IDS[:2], 2, "3", spans=[("2", 0, 1), ("3", 1, 2)])], "weight_versions"),
        ([event(IDS[:2], 2, "3") | {"meta_info": {"completion_tokens": 2, "weight_versions": [7]}}], "not a list"),
    ],
)
def test_what_is_wrong(events: list[Any], reason: str) -> None:
    cursor = StreamCursor()
    with pytest.raises(EngineError, match=reason):
        for each in events:
            cursor.new_part(each)


def test_the_servers_own_account_of_the_versions_agrees() -> None:
    spans = [("3", 0, 5), ("4", 5, 9)]
    assert len(read(event(IDS[:2], 2), event(IDS[2:5], 5), event(IDS[5:9], 9, "4", spans=spans))) == 9
    assert read(event([], 0, "4", spans=[("3", 0, 0)])) == []


@pytest.mark.parametrize("garbage", [None, 3, [], {}, {"error": {"message": "x"}}, {"output_ids": 3, "meta_info": {}}])
def test_what_it_cannot_read_is_left_to_the_parser(garbage: Any) -> None:
    assert StreamCursor().new_part(garbage) is garbage


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=1, max_size=12), st.integers(1, 12))
def test_events_that_arrive_together_are_joined(steps: list[tuple[int, int]], at_once: int) -> None:
    """In whatever portions events arrive: every token once, in order, and under its own version."""
    events, expected, total, version = [], [], 0, 3
    for new, bump in steps:
        version += bump
        events.append(event(IDS[:1] * new, total + new, str(version)))
        expected += [str(version)] * new
        total += new
    cursor, found = StreamCursor(), []
    for first in range(0, len(events), at_once):
        for part in cursor.parts(events[first : first + at_once]):
            assert len(part["output_ids"]) == len(part["meta_info"]["output_token_logprobs"])
            found += [part["meta_info"]["weight_version"]] * len(part["output_ids"])
    assert found == expected


def test_joined_events_say_how_the_stream_ended() -> None:
    last = event(IDS[2:4], 4)
    last["meta_info"]["finish_reason"] = {"type": "length"}
    (part,) = StreamCursor().parts([event(IDS[:2], 2), last])
    assert (part["output_ids"], part["meta_info"]["finish_reason"]) == (IDS[:4], {"type": "length"})


def test_what_came_before_a_broken_event_is_kept() -> None:
    parts = StreamCursor().parts([event(IDS[:1], 1), event(IDS[1:2], 2), event(IDS[5:6], 6)])
    assert next(parts)["output_ids"] == IDS[:2]
    with pytest.raises(EngineError, match="some are lost"):
        next(parts)


def test_errors_are_not_joined() -> None:
    error = {"error": {"message": "x"}}
    assert [part.get("output_ids") for part in StreamCursor().parts([event(IDS[:1], 1), error])] == [IDS[:1], None]
