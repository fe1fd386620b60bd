"""Stacks as py-spy writes them, and what kind of work they are; the run around them is `python -m bench.profile`'s."""

from __future__ import annotations

import pytest

from opd_async.bench.profile import kind_of, read_samples, share_of, table

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


def test_samples_are_summed_and_seconds_dealt_out() -> None:
    raw = f"main (a.py:1);step ({ROOT}/actors/engine/model.py:3) 30\nmain (a.py:1);run (/site/zmq/asyncio.py:2) 10\n"
    raw += f"torn (\nmain (a.py:1);step ({ROOT}/actors/engine/model.py:3) 2\n"
    stacks = read_samples(raw)
    assert stacks.total() == 42 and len(stacks) == 2
    share = share_of("learner", 0.21, stacks, "zmq/")
    assert share.kinds["model"] == pytest.approx(32 / 42) and share.within == pytest.approx(10 / 42)
    lines = table([share]).splitlines()
    assert lines[2] == "| learner | 160.0 | 0.0 | 0.0 | 50.0 | 0.0 | 0.0 | 0.0 | 210.0 |"
    assert lines[3].startswith("| all | 160.0 | 0.0 | 0.0 | 50.0 |")


def test_a_process_without_samples_has_no_shares() -> None:
    share = share_of("learner", 0.2, read_samples(""), None)
    assert share.within == 0 and set(share.kinds.values()) == {0.0}
