"""Engines that answer nonsense and roles that send garbage: counted, asked again, never trained on."""

from __future__ import annotations

import json
from pathlib import Path

import zmq
from deadlines import patience
from harness import SLOTS, Launch, check_trained, steps, topology, write_topology
from lies import embedded_engine, liar

from opd_async.keys import RunKeys
from opd_async.plan.plan import Plan
from opd_async.transport.door import Passport
from opd_async.transport.wire import SCHEMA_VERSION

STEPS, ENOUGH = 8, 5
"""At least so many steps, with so many lies to either side; the slower the machine, the fewer requests a step takes."""


def send_garbage(plan: Plan, keys: RunKeys) -> int:
    """Malformed frames to both sockets for chunks, from roles that have gone mad; returns how many to each."""
    garbage = [
        [b"not msgpack"],
        [b""],
        [b"\x94\x63\xa5Chunk\x80\x90"],  # a schema version of the future
        [bytes([0x94, SCHEMA_VERSION]) + b"\xa5Chunk\x80\x90"],  # no fields
        [bytes([0x94, SCHEMA_VERSION]) + b"\xa6Nobody\x80\x90"],
    ]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for address, name in ((plan.scored[0], "teacher-0"), (plan.chunks[0], "rollout-0")):
        with context.socket(zmq.PUSH) as sender:
            sender.linger = round(1000 * patience(30))
            Passport(name, keys, "mad").show(sender)
            sender.connect(address)
            for frames in garbage:
                sender.send_multipart(frames)
    context.term()
    return len(garbage)


def test_lies_and_garbage(inputs: Path, tmp_path: Path) -> None:
    student_lies: list[str] = []
    teacher_lies: list[str] = []
    with (
        embedded_engine(inputs / "student") as student_engine,
        embedded_engine(inputs / "teacher") as teacher_engine,
        liar(student_engine, 6, student_lies) as student,
        liar(teacher_engine, 4, teacher_lies) as teacher,
    ):
        values = topology(
            inputs,
            tmp_path,
            schedule__steps=1000,
            rollout__resend_after_s=2.0,
            rollout__request_deadline_s=3.0,
            teacher__max_in_flight=2,
            teacher__request_deadline_s=3.0,
        )
        for side, url in (("student", student), ("teacher", teacher)):
            values["engines"][side] |= {"kind": "external", "urls": [url]}
        with Launch(write_topology(values, tmp_path / "run.yaml")) as run:
            folder = tmp_path / "run"
            run.wait_for_steps(folder, 1)
            keys = RunKeys.of_environment(run.find("actors.rollout").environ())
            assert keys is not None
            garbage = send_garbage(Plan.model_validate_json((folder / "plan.json").read_bytes()), keys)
            run.wait_for_steps(folder, STEPS)
            while min(len(student_lies), len(teacher_lies)) < ENOUGH:
                run.wait_for_steps(folder, len(steps(folder)) + 1)
            run.stop()
    check_trained(folder, 1, len(steps(folder)))
    report = json.loads((folder / "report.json").read_text())
    # all but those that were told while the run was ending: to streams, batches and a canary that it had given up
    assert report["counters"]["engine_errors"] >= max(len(student_lies) - SLOTS, 3)
    told_to_teacher = report["counters"]["teacher_retries"] + report["counters"].get("canaries_failed", 0)
    assert told_to_teacher >= len(teacher_lies) - values["teacher"]["max_in_flight"] - 1  # one canary
    assert report["counters"]["malformed_frames"] >= 2 * garbage
    # what a liar said did not get through: the distillation signal stays finite and small
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(row["learner_reverse_kl"]) < 5 for row in rows)
