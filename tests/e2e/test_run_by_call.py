"""Runs from Python: a script, a thread, a running loop; the same errors; nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from deadlines import patience
from harness import ROOT, left_running, topology

from opd_async import InputError, InterruptedRun, OpdError, Report, RoleError, Topology, run, run_async

PATIENCE_S = patience(70.0)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def short(inputs: Path, tmp_path: Path, **changes: Any) -> Topology:
    """A run of two steps with held-out prompts."""
    few = {"schedule__steps": 2, "rollout__sampling__max_response_tokens": 20, "evaluation__prompts": 4}
    held_out = {"data__held_out": {"path": str(inputs / "prompts.jsonl")}, "evaluation__teacher": False}
    return Topology(**topology(inputs, tmp_path / "runs", **{**few, **held_out, **changes}))


def check_report(report: Report, tmp_path: Path) -> None:
    """What a run of two steps must come to."""
    assert isinstance(report, Report) and report.steps == 2
    assert report.student_after is not None and 0.0 <= report.student_after.pass_at_1 <= 1.0
    assert report.folder == tmp_path / "runs" / "run"
    assert [row["step"] for row in report.rows if "evaluation" not in row] == [1, 2]
    assert [row["evaluation"] for row in report.rows if "evaluation" in row] == ["student", "student"]
    assert json.loads((tmp_path / "runs/run/report.json").read_text()) == report.model_dump(mode="json")
    assert left_running(tmp_path) == []


def state_of_the_process() -> tuple[Any, ...]:
    """What a library must leave alone."""
    root = logging.getLogger()
    handlers = tuple(signal.getsignal(number) for number in SIGNALS)
    return (
        handlers,
        tuple(root.handlers),
        root.level,
        asyncio.get_event_loop_policy(),
        tuple(sys.path),
        dict(os.environ),
    )


@pytest.mark.long
def test_from_a_thread(inputs: Path, tmp_path: Path) -> None:
    before, said, found = state_of_the_process(), list[str](), list[Report]()
    thread = threading.Thread(target=lambda: found.append(run(short(inputs, tmp_path), say=said.append)))
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), f"the run did not end within {PATIENCE_S} s: {said[-3:]}"
    check_report(found[0], tmp_path)
    assert state_of_the_process() == before
    assert any("step 2/2" in line for line in said)


def test_from_a_running_loop(inputs: Path, tmp_path: Path) -> None:
    """Python's own loop, as in a notebook; it stays responsive, and `run` says what to write instead."""
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await asyncio.sleep(0.05)
            beats += 1

    async def notebook() -> Report:
        with pytest.raises(RuntimeError, match="write `await run_async"):
            run(short(inputs, tmp_path))
        heart = asyncio.create_task(beat())
        async with asyncio.timeout(PATIENCE_S):
            report = await run_async(short(inputs, tmp_path), say=lambda line: None)
        heart.cancel()
        return report

    before = state_of_the_process()
    check_report(asyncio.run(notebook()), tmp_path)
    assert state_of_the_process() == before and beats > 10


SCRIPT = """
import json, signal, sys
from opd_async import InterruptedRun, Topology, run

topology = Topology(**json.loads(open(sys.argv[1]).read()))
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
try:
    report = run(topology)
    print("pass@1", report.student_after.pass_at_1)
except InterruptedRun as stopped:
    print("stopped:", stopped)
assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
print("and the script goes on")
"""


def script(tmp_path: Path, wanted: Topology) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "topology.json").write_text(wanted.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-u", str(tmp_path / "script.py"), str(tmp_path / "topology.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_from_a_script(inputs: Path, tmp_path: Path) -> None:
    process = script(tmp_path, short(inputs, tmp_path))
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    assert "pass@1 " in said and said.endswith("and the script goes on\n") and left_running(tmp_path) == []


@pytest.mark.long
def test_ctrl_c_in_a_script_saves_and_raises(inputs: Path, tmp_path: Path) -> None:
    process = script(tmp_path, short(inputs, tmp_path, schedule__steps=500))
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if re.search(r"\bstep +\d+/", line):
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, "".join(said) + rest
    assert "stopped: run: stopped by a signal, saved after step" in rest and "and the script goes on" in rest


def test_the_errors_are_those_of_the_command(inputs: Path, tmp_path: Path) -> None:
    wrong = short(inputs, tmp_path, rollout__slots=99, learner__tensor_parallel=3)
    with pytest.raises(InputError) as caught:
        run(wrong, say=lambda line: None)
    assert str(caught.value).startswith("topology: ") and "  rollout.slots: 99, but the student" in str(caught.value)
    assert "learner.tensor_parallel: 3 does not divide" in str(caught.value) and not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match=r"a Topology was expected, not str; write Topology.load\(path\)"):
        run("my.yaml")  # type: ignore[arg-type]
    assert issubclass(InterruptedRun, OpdError) and issubclass(RoleError, OpdError)
