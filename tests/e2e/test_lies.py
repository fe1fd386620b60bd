"""Engines that answer nonsense and strangers that send garbage: counted, asked again, never trained on."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq
from harness import ROOT, SLOTS, Launch, check_trained, topology, write_topology

from opd_async.free_ports import free_ports
from opd_async.plan import Plan
from opd_async.wire import SCHEMA_VERSION

STEPS = 8


def free_port() -> int:
    return free_ports("127.0.0.1", 1)[0]


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A helper process, ended with the block."""
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as running:
        try:
            yield running
        finally:
            running.terminate()


@contextmanager
def lying_engine(model: Path, every: int, lies: list[str]) -> Iterator[str]:
    """An embedded engine behind the proxy; yields the proxy's URL."""
    engine, proxy = free_port(), free_port()
    arguments = ("--model-path", str(model), "--host", "127.0.0.1", "--port", str(engine), "--context-length", "256")
    liar = str(Path(__file__).with_name("lying_proxy.py"))
    with (
        process("-m", "actors.engine.server", *arguments, "--max-total-tokens", "8192"),
        process(liar, str(proxy), f"http://127.0.0.1:{engine}", str(every)) as running,
    ):
        assert running.stdout is not None
        reader = threading.Thread(
            target=lambda: lies.extend(line.strip() for line in running.stdout or ()), daemon=True
        )
        reader.start()
        yield f"http://127.0.0.1:{proxy}"


def send_garbage(plan: Plan) -> int:
    """Malformed frames to every listening socket of the run; returns how many."""
    garbage = [
        [b"not msgpack"],
        [b""],
        [b"\x94\x63\xa5Chunk\x80\x90"],  # a schema version of the future
        [bytes([0x94, SCHEMA_VERSION]) + b"\xa5Chunk\x80\x90"],  # no fields
        [bytes([0x94, SCHEMA_VERSION]) + b"\xa6Nobody\x80\x90"],
    ]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for address, kind in ((plan.scored, zmq.PUSH), (plan.chunks[0], zmq.PUSH), (plan.control, zmq.DEALER)):
        with context.socket(kind) as sender:
            sender.linger = 2000
            sender.connect(address)
            for frames in garbage:
                sender.send_multipart(frames)
    context.term()
    return len(garbage)


def test_lies_and_garbage(inputs: Path, tmp_path: Path) -> None:
    student_lies: list[str] = []
    teacher_lies: list[str] = []
    with (
        lying_engine(inputs / "student", 6, student_lies) as student,
        lying_engine(inputs / "teacher", 4, teacher_lies) as teacher,
    ):
        values = topology(
            inputs, tmp_path, schedule__steps=STEPS, rollout__resend_after_s=2.0, teacher__max_in_flight=2
        )
        for side, url in (("student", student), ("teacher", teacher)):
            values["engines"][side] |= {"kind": "external", "urls": [url]}
        with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
            folder = tmp_path / "run"
            run.wait_for_steps(folder, 1)
            garbage = send_garbage(Plan.model_validate_json((folder / "plan.json").read_bytes()))
            assert run.wait() == 0, run.text()
    check_trained(folder, 1, STEPS)
    report = json.loads((folder / "report.json").read_text())
    assert len(student_lies) >= 5 and len(teacher_lies) >= 5
    # all but those that were told while the run was ending: to streams and batches that it had given up
    assert report["counters"]["engine_errors"] >= max(len(student_lies) - SLOTS, 3)
    assert report["counters"]["teacher_retries"] >= len(teacher_lies) - values["teacher"]["max_in_flight"]
    assert report["counters"]["malformed_frames"] >= 2 * garbage
    # what a liar said did not get through: the distillation signal stays finite and small
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(row["learner_reverse_kl"]) < 5 for row in rows)
