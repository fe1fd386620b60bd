"""Traces: what is kept of the events of a process, and the timeline that is made of all."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from trace_format import read_checked

from opd_async.cli.main import main
from opd_async.data.jsonl import read_jsonl
from opd_async.errors import InputError
from opd_async.telemetry import trace as trace_module
from opd_async.telemetry.trace import BLOCK, BLOCK_S, OFF, TRACE_FOLDER, TRAINED, Trace
from opd_async.telemetry.trace_file import (
    TRACE_FILE,
    Event,
    figures,
    read_processes,
    samples_of,
    timeline,
    without_overlaps,
    write_trace,
)


class Now:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def traced(folder: Path, name: str, now: Now, limit: int = 1 << 20) -> Trace:
    return Trace(folder / TRACE_FOLDER / f"{name}.jsonl", name, limit, now)


def events_in(folder: Path, name: str) -> list[list[object]]:
    return [event for row in read_jsonl(folder / TRACE_FOLDER / f"{name}.jsonl") for event in row["events"]]


def a_run(folder: Path) -> None:
    """Two samples through three processes: the second is cut in step 1."""
    now = Now()
    with traced(folder, "rollout-0", now) as rollout, traced(folder, "teacher-0", now) as teacher:
        now.time = 1003.0
        rollout.span("generate", "generate", 2.0, sample=0, tokens=40)
        rollout.span("generate", "generate", 3.0, sample=1, tokens=60)
        now.time = 1004.0
        teacher.span("from token to score", "scored", 1.0, sample=0, start=0, end=40)
        teacher.span("from token to score", "scored", 1.5, sample=1, start=0, end=60)
    with traced(folder, "intake-0", now) as intake:
        now.time = 1005.0
        intake.event(TRAINED, "trained to its end, step 1", sample=0, end=40, step=1)
        intake.event(TRAINED, "cut, step 1", sample=1, end=60, step=1)
        intake.span("steps", "step 1", 5.0, tokens=100)


def test_a_process_without_a_trace_forgets_everything() -> None:
    OFF.span("lane", "name", 1.0)
    OFF.event("lane", "name")
    with OFF.during("lane", "name"):
        pass
    OFF.close()
    assert OFF.lost == 0 and not OFF._events


def test_events_are_written_in_blocks_by_number_and_by_time(tmp_path: Path) -> None:
    now = Now()
    trace = traced(tmp_path, "intake-0", now)
    for index in range(BLOCK - 1):
        trace.event("lane", str(index))
    assert events_in(tmp_path, "intake-0") == []
    trace.event("lane", "the last of a block")
    assert len(events_in(tmp_path, "intake-0")) == BLOCK
    trace.event("lane", "soon")
    now.time += BLOCK_S
    trace.span("lane", "late", 0.25, sample=3)
    assert events_in(tmp_path, "intake-0")[-2:] == [
        ["lane", "soon", 1000.0, None, {}],
        ["lane", "late", 1000.75, 0.25, {"sample": 3}],
    ]
    trace.event("lane", "at the end")
    trace.close()
    trace.close()
    assert events_in(tmp_path, "intake-0")[-1][1] == "at the end" and trace.lost == 0


def test_a_process_that_starts_again_goes_on_behind_half_a_row(tmp_path: Path) -> None:
    now = Now()
    with traced(tmp_path, "intake-0", now) as trace:
        trace.event("lane", "before")
    with (tmp_path / TRACE_FOLDER / "intake-0.jsonl").open("ab") as file:
        file.write(b'{"process": "inta')
    with traced(tmp_path, "intake-0", now) as trace:
        trace.event("lane", "after")
    assert [event[1] for event in events_in(tmp_path, "intake-0")] == ["before", "after"]


def test_a_span_around_a_block_that_fails_is_kept(tmp_path: Path) -> None:
    now = Now()
    with traced(tmp_path, "intake-0", now) as trace, pytest.raises(ValueError), trace.during("lane", "fails", step=2):
        raise ValueError
    ((lane, name, _, seconds, values),) = events_in(tmp_path, "intake-0")
    assert (lane, name, values) == ("lane", "fails", {"step": 2}) and isinstance(seconds, float)


def test_a_full_file_takes_no_more_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = Now()
    with caplog.at_level(logging.WARNING, trace_module.__name__), traced(tmp_path, "intake-0", now, 100) as trace:
        for index in range(3 * BLOCK):
            trace.event("lane", str(index))
    assert len(events_in(tmp_path, "intake-0")) == BLOCK and trace.lost == 2 * BLOCK
    full, lost = caplog.messages
    assert full.endswith("is full: no more events go there; raise telemetry.trace_mib")
    assert lost.startswith(f"{2 * BLOCK} events have no place in ")


def test_a_full_disk_costs_events_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace(Path("/dev/full"), "intake-0", 1 << 20)
    for index in range(2 * BLOCK):
        trace.event("lane", str(index))
    trace.close()
    assert trace.lost == 2 * BLOCK
    refused, lost = caplog.messages
    assert refused.startswith("/dev/full cannot be written: ") and lost.startswith(f"{2 * BLOCK} events have no place")


def test_overlapping_spans_get_rows_and_others_share_one() -> None:
    spans = [Event("lane", "x", at, seconds, {}) for at, seconds in ((0, 4), (1, 1), (1.5, 1), (2, 1), (4, 1))]
    rows = [[event.at for event in row] for row in without_overlaps(spans)]
    assert rows == [[0.0, 4.0], [1.0, 2.0], [1.5]]


def test_the_timeline_has_every_event_where_a_reader_looks_for_it(tmp_path: Path) -> None:
    a_run(tmp_path)
    row = {"step": 1, "time": 1005.5, "reverse_kl": 0.25, "tokens": 100, "grad_norm": None}
    lines = [{"evaluation": "student", "time": 1005.0, "reverse_kl": 1.0}, row]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert write_trace(tmp_path, tmp_path / TRACE_FILE) == len(read_checked(tmp_path / TRACE_FILE))
    events = read_checked(tmp_path / TRACE_FILE)
    processes = {one["pid"]: one["args"]["name"] for one in events if one["name"] == "process_name"}
    assert list(processes.values()) == ["figures", "rollout-0", "teacher-0", "intake-0", "samples"]
    spans = [one for one in events if one["ph"] in "Xi"]
    lanes = {(one["pid"], one["tid"]): one["args"]["name"] for one in events if one["name"] == "thread_name"}
    placed = {
        (processes[one["pid"]], lanes[one["pid"], one["tid"]], one["name"], one["ts"], one.get("dur")) for one in spans
    }
    # the first event began at 1000 s; times are microseconds
    assert placed == {
        ("rollout-0", "generate (1)", "generate", 0, 3_000_000),
        ("rollout-0", "generate (2)", "generate", 1_000_000, 2_000_000),
        ("teacher-0", "from token to score (1)", "scored", 2_500_000, 1_500_000),
        ("teacher-0", "from token to score (2)", "scored", 3_000_000, 1_000_000),
        ("intake-0", "trained", "trained to its end, step 1", 5_000_000, None),
        ("intake-0", "trained", "cut, step 1", 5_000_000, None),
        ("intake-0", "steps", "step 1", 0, 5_000_000),
        ("samples", "sample 0", "generate", 1_000_000, 2_000_000),
        ("samples", "sample 0", "scored", 3_000_000, 1_000_000),
        ("samples", "sample 0", "trained to its end, step 1", 5_000_000, None),
        ("samples", "sample 1 (1)", "generate", 0, 3_000_000),
        ("samples", "sample 1 (2)", "scored", 2_500_000, 1_500_000),
        ("samples", "sample 1 (1)", "cut, step 1", 5_000_000, None),
    }
    curves = [(one["name"], one["ts"], one["args"]) for one in events if one["ph"] == "C"]
    assert curves == [
        ("reverse KL", 5_500_000, {"reverse KL": 0.25}),
        ("tokens of the step", 5_500_000, {"tokens of the step": 100.0}),
    ]
    assert {one["args"]["sample"] for one in spans if processes[one["pid"]] == "samples"} == {0, 1}


def test_of_many_samples_every_so_manyth_is_shown_and_none_that_was_never_trained(tmp_path: Path) -> None:
    now = Now()
    with traced(tmp_path, "intake-0", now) as trace:
        trace.span("generate", "generate", 1.0, sample=99)
        for sample in range(10):
            trace.event(TRAINED, "cut, step 1", sample=sample)
    processes = read_processes(tmp_path)
    assert [one.name for one in samples_of(processes, 4)] == ["sample 0", "sample 3", "sample 6", "sample 9"]
    assert len(samples_of(processes, 100)) == 10


def test_without_figures_or_events_there_is_nothing_to_draw(tmp_path: Path) -> None:
    assert figures(tmp_path / "metrics.jsonl") == []
    assert [row["args"] for row in timeline([]) if row["name"] == "process_name"] == [
        {"name": "figures"},
        {"name": "samples"},
    ]


def test_a_timeline_that_has_no_room_leaves_nothing_behind(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; it holds for a process of its own alone."""
    a_run(tmp_path)
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)); "
    limited += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "from opd_async.cli.main import main; main(sys.argv[1:])"
    before = sorted(path.name for path in tmp_path.iterdir())
    ended = subprocess.run([sys.executable, "-c", limited, "trace", str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 2 and f"{tmp_path / TRACE_FILE}: cannot be written: File too large" in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def code_of(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def test_the_command_says_what_it_has_made_and_what_it_cannot_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"has no trace; a run writes one with telemetry\.trace: true"):
        write_trace(tmp_path, tmp_path / "out")
    a_run(tmp_path)
    out = tmp_path / "elsewhere.json.gz"
    assert code_of("trace", str(tmp_path), "--output", str(out), "--samples", "1") == 0
    events = read_checked(out)
    assert capsys.readouterr().out == f"{len(events)} events: {out}; open it in https://ui.perfetto.dev\n"
    assert code_of("trace", str(tmp_path), "--output", str(tmp_path / "no" / "folder")) == 2
    assert "give another place with --output" in capsys.readouterr().err
    (tmp_path / TRACE_FOLDER / "old-0.jsonl").write_text('{"events": [["lane"]]}\n')
    assert code_of("trace", str(tmp_path)) == 2
    assert "its trace is not of this version" in capsys.readouterr().err
