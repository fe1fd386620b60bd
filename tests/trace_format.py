"""The Chrome trace format as its readers take it: a checker for tests."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

NAMES = {"process_name": str, "thread_name": str, "process_sort_index": int, "thread_sort_index": int}


def read_checked(path: Path) -> list[dict[str, Any]]:
    """The events of a file; raises `AssertionError` for what a reader would refuse or draw wrongly."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        document = json.load(file)
    assert set(document) == {"displayTimeUnit", "traceEvents"} and document["displayTimeUnit"] == "ms"
    events: list[dict[str, Any]] = document["traceEvents"]
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    named: set[tuple[int, int]] = set()
    for event in events:
        assert isinstance(event["name"], str) and isinstance(event["pid"], int), event
        kind = event["ph"]
        if kind == "M":
            _check_name(event)
            named |= {(event["pid"], event["tid"])} if event["name"] == "thread_name" else set()
            continue
        assert isinstance(event["ts"], int) and event["ts"] >= 0, event
        if kind == "C":
            assert all(isinstance(value, float) for value in event["args"].values()), event
        elif kind == "X":
            assert isinstance(event["dur"], int) and event["dur"] >= 0, event
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        else:
            assert kind == "i" and event["s"] == "t", event
        assert kind == "C" or (event["pid"], event["tid"]) in named, f"a lane without a name: {event}"
    for spans in lanes.values():
        spans.sort()
        for (_, end), (begin, _) in pairwise(spans):
            assert end <= begin, f"spans of one lane overlap: {end} is after {begin}"
    return events


def _check_name(event: dict[str, Any]) -> None:
    value = event["args"]["name" if event["name"].endswith("_name") else "sort_index"]
    assert isinstance(value, NAMES[event["name"]]), event
