"""The stream of weights on CUDA, by a device that only writes down what is asked of it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from opd_async.learner.weights.lane import Lane


class Recorder:
    """CUDA's streams and events, as a list of what happened in which."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.at = "main"
        self.device: Any = None

    def stream(self, name: str) -> Any:
        recorder = self

        class Stream:
            def __init__(self, *_args: Any) -> None:
                self.name = name

            def record_event(self) -> str:
                recorder.log.append(f"event of {self.name}")
                return "event"

            def wait_event(self, event: str) -> None:
                recorder.log.append(f"{self.name} waits for {event}")

            def synchronize(self) -> None:
                recorder.log.append(f"host waits for {self.name}")

        return Stream

    @contextmanager
    def inside(self, stream: Any) -> Any:
        before, self.at = self.at, stream.name
        try:
            yield
        finally:
            self.at = before


def recorded(monkeypatch: pytest.MonkeyPatch, failure: str = "") -> Recorder:
    recorder = Recorder()

    class Work:
        def wait(self) -> None:
            recorder.log.append(f"{recorder.at} waits for the broadcast")

    def broadcast(tensor: Any, src: int, group: Any, async_op: bool) -> Work:
        if failure:
            raise RuntimeError(failure)
        recorder.log.append(f"{tensor} broadcast in {recorder.at}")
        return Work()

    monkeypatch.setattr(torch.cuda, "Stream", recorder.stream("own"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: recorder.stream("main")())
    monkeypatch.setattr(torch.cuda, "stream", recorder.inside)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(recorder, "device", device))
    monkeypatch.setattr(dist, "broadcast", broadcast)
    return recorder


GROUP: Any = object()


def test_what_is_sent_is_ready_and_the_callers_stream_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(monkeypatch)
    lane = Lane(torch.device("cuda", 3))
    payload: Any = ["a", "b"]
    assert lane.broadcast(GROUP, payload, lane.ready()) == ""
    assert recorder.log == [
        "event of main",
        "own waits for event",
        "a broadcast in own",
        "b broadcast in own",
        *["own waits for the broadcast"] * 2,
        "host waits for own",
    ]
    assert recorder.at == "main" and recorder.device == torch.device("cuda", 3)


def test_on_a_cpu_there_are_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = recorded(monkeypatch)
    lane = Lane(torch.device("cpu"))
    assert lane.ready() is None
    payload: Any = ["a"]
    assert lane.broadcast(GROUP, payload, None) == ""
    assert recorder.log == ["a broadcast in main", "main waits for the broadcast"] and recorder.device is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_broken_broadcast_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    recorder = recorded(monkeypatch, failure="connection closed by peer")
    lane = Lane(torch.device(device))
    payload: Any = ["a"]
    assert lane.broadcast(GROUP, payload, lane.ready()) == "connection closed by peer"
    assert lane.broadcast(None, payload, None) == "the group was given up"
    assert recorder.at == "main", "the caller's stream is current again"
