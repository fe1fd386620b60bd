"""`tracking.function`: every row in order, in a thread; one that raises or hangs costs rows, never the run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from opd_async.telemetry.progress import Progress
from opd_async.telemetry.tracking import Tracker

MODULE = """
import threading

rows = []
threads = set()
may_go_on = threading.Event()

def right(kind, row):
    rows.append((kind, row))
    threads.add(threading.current_thread().name)

def raising(kind, row):
    rows.append((kind, row))
    if row.get("step") != 2:
        raise SystemExit("no room at the other side")

def slow(kind, row):
    may_go_on.wait(60)
    rows.append((kind, row))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    (tmp_path / "tracked_hooks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("tracked_hooks", None)
    with Tracker("tracked_hooks:right", lambda line: None):
        yield sys.modules["tracked_hooks"]


def test_every_row_arrives_in_order_and_in_a_thread(module: object) -> None:
    said: list[str] = []
    with Tracker("tracked_hooks:right", said.append) as tracker:
        row = {"step": 1, "counts": [1, 2]}
        tracker.track("step", row)
        row["counts"].append(3)  # type: ignore[attr-defined]
        tracker.track("evaluation", {"evaluation": "student"})
    assert module.rows == [("step", {"step": 1, "counts": [1, 2]}), ("evaluation", {"evaluation": "student"})]  # type: ignore[attr-defined]
    assert module.threads == {"tracking"} and said == []  # type: ignore[attr-defined]


def test_what_it_raises_is_said_once_and_counted(module: object) -> None:
    said: list[str] = []
    with Tracker("tracked_hooks:raising", said.append) as tracker:
        for step in (1, 2, 3):
            tracker.track("step", {"step": step})
    assert [row["step"] for _, row in module.rows] == [1, 2, 3]  # type: ignore[attr-defined]
    assert tracker.failures == 2
    assert said == [
        "warning: tracking.function: tracked_hooks:raising raised SystemExit: no room at the other side for step 1; "
        "mend the function, and look at the row in metrics.jsonl: the run goes on",
        "warning: tracking.function: tracked_hooks:raising has not got everything: "
        "2 rows on which it raised, 0 left out",
    ]


def test_a_slow_one_loses_rows_and_holds_nothing_up(module: object) -> None:
    said: list[str] = []
    with Tracker("tracked_hooks:slow", said.append, max_waiting=2) as tracker:
        for step in range(10):
            tracker.track("step", {"step": step})
        assert tracker.left_out >= 7
        module.may_go_on.set()  # type: ignore[attr-defined]
    assert len(module.rows) == 10 - tracker.left_out  # type: ignore[attr-defined]
    assert said[0].endswith("is slower than the run; rows are left out from here on") and len(said) == 2


def test_without_a_function_there_is_no_thread() -> None:
    before = threading.active_count()
    with Tracker(None, print) as tracker:
        tracker.track("step", {})
        assert threading.active_count() == before


def test_events_are_what_the_terminal_says_of_everything_else() -> None:
    said, events = list[str](), list[str]()
    progress = Progress(said.append, 10)
    progress.on_event = events.append
    progress.say("rollout-0 ended (killed by SIGKILL); restarting in 0.5 s")
    assert events == ["rollout-0 ended (killed by SIGKILL); restarting in 0.5 s"] and len(said) == 1
