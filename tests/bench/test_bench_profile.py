"""Stacks as py-spy writes them, and what kind of work they are; the run around them is `python -m bench.profile`'s."""

from __future__ import annotations

import pytest

from opd_async.bench.profile import Share, kind_of, read_samples, table

ROOT = "/site/opd_async"


@pytest.mark.parametrize(
    ("frames", "kind"),
    [
        ([f"main ({ROOT}/actors/engine/server.py:9)", f"step ({ROOT}/actors/engine/model.py:3)"], "model"),
        ([f"step ({ROOT}/learner/trainer.py:3)", "adam (/site/torch/optim/adamw.py:7)"], "model"),
        ([f"send ({ROOT}/actors/client/engine_client.py:4)", "read (/site/aiohttp/streams.py:2)"], "HTTP and JSON"),
        ([f"take ({ROOT}/actors/intake/taking.py:8)", f"decode ({ROOT}/transport/wire.py:40)"], "messages"),
        ([f"update ({ROOT}/learner/weights/buckets.py:8)"], "weights"),
        ([f"main ({ROOT}/run/lifecycle.py:8)", "select (/lib/python3.11/selectors.py:468)"], "waiting"),
        ([f"plan ({ROOT}/scheduling/leases.py:8)", "sorted (/lib/python3.11/bisect.py:3)"], "own code"),
    ],
)
def test_the_innermost_frame_that_says_something_decides(frames: list[str], kind: str) -> None:
    assert kind_of(frames) == kind


def test_samples_are_summed_by_kind_and_seconds_dealt_out() -> None:
    raw = f"main (a.py:1);step ({ROOT}/actors/engine/model.py:3) 30\nmain (a.py:1);run (/site/zmq/asyncio.py:2) 10\n"
    raw += "torn (\n"
    assert read_samples(raw) == {"model": 30, "messages": 10}
    kinds = dict.fromkeys(["weights", "HTTP and JSON", "files", "own code", "waiting"], 0.0)
    lines = table([Share("learner", 0.2, kinds | {"model": 0.75, "messages": 0.25})]).splitlines()
    assert lines[2] == "| learner | 150.0 | 0.0 | 0.0 | 50.0 | 0.0 | 0.0 | 0.0 | 200.0 |"
    assert lines[3].startswith("| all | 150.0 | 0.0 | 0.0 | 50.0 |")
