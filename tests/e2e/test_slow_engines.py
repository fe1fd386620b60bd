"""Engines that answer a hundred times slower than their peers are named, and the run does not become as slow."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from claimed_ports import claimed_port
from harness import Launch, check_trained, steps, topology, write_topology
from lies import embedded_engine, process

MOST_STEPS = 500
"""The run is ended before, once both slow engines were found."""
DELAY_S = 2.5
TIMES = 8.0
"""A sound engine that shares its processors with others takes far less than an eighth of the delay."""


@contextmanager
def slow(url: str) -> Iterator[str]:
    """A proxy that makes the engine at `url` slow; yields its address."""
    with (
        claimed_port() as port,
        process(str(Path(__file__).with_name("slow_proxy.py")), str(port), url, str(DELAY_S)),
    ):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.long
def test_the_work_of_slow_engines_goes_to_their_peers(inputs: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        urls: dict[str, list[str]] = {}
        for side in ("student", "teacher"):
            one, two = (stack.enter_context(embedded_engine(inputs / side)) for _ in range(2))
            urls[side] = [one, stack.enter_context(slow(two))]
        values = topology(inputs, tmp_path, schedule__steps=MOST_STEPS, supervisor__slow_engine=TIMES)
        for side in ("student", "teacher"):
            values["engines"][side] |= {"kind": "external", "urls": urls[side], "replicas": 2}
        with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
            for side in ("student", "teacher"):
                run.wait_for_text(f"{urls[side][1]} is slow: it takes", deadline_s=120.0)
            run.wait_for_steps(tmp_path / "run", len(steps(tmp_path / "run")) + 1)
            run.interrupt(signal.SIGTERM)
            assert run.wait() == 130, run.text()
            text = run.text()
    check_trained(tmp_path / "run", 1, len(steps(tmp_path / "run")))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["slow_engines"]) == {urls["student"][1], urls["teacher"][1]}, text
    assert report["restarts"] == {}, text
    for side in ("student", "teacher"):
        assert f"{urls[side][0]} is slow" not in text
