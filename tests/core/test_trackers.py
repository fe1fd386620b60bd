"""`tracking.trackers`: rows through a process of its own. One that raises, hangs or dies costs rows, never the run.

The package is a stand-in here; what the real ones write is read back in `tests/monitoring/test_tracker_files.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from deadlines import patience
from small_runs import topology_data, write_topology
from stand_in_tracker import told, write_package

from opd_async.checks.trackers import tracker_problems
from opd_async.config.topology import Topology
from opd_async.config.topology_file import load_topology
from opd_async.telemetry.trackers import Trackers, public
from opd_async.tracker_process.feeder import Feeder
from opd_async.tracker_process.figures import numbers


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in, where processes find it."""
    write_package(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("TOLD", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def topology(root: Path, *overrides: str) -> Topology:
    path = write_topology(root, topology_data(root))
    return load_topology(path, ["tracking.trackers=[wandb]", *overrides])


class Launch:
    """One launch of a run: what was said, what was lost, and what the package was told in all launches so far."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.said: list[str] = []
        self.lost: Counter[str] = Counter()
        self.folder = root / "run"
        self.trackers = Trackers(
            topology(root, *overrides), self.folder, self.said.append, lambda kind: self.lost.update([kind])
        )

    @property
    def told(self) -> list[dict[str, Any]]:
        return told(self.folder)

    def steps(self, *numbers: int, tokens: int = 7) -> None:
        for step in numbers:
            self.trackers.track("step", {"step": step, "time": 1.0, "tokens": tokens, "counts": [1, 2], "none": None})


def sample(step: int) -> dict[str, Any]:
    scores = {"student_logprobs": [-1.0, -2.0], "teacher_logprobs": [-1.5, -2.0]}
    facts = {"step": step, "prompt_id": 4, "prompt_tokens": 1, "response_tokens": 2, "finish": "stop", "reward": None}
    return {**facts, "prompt": "1+1=", "response": "2", **scores}


def test_a_run_from_its_topology_to_its_report(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "tracking.project=sums", "tracking.group=night", "engines.teacher.api_key=hush")
    with launch.trackers:
        launch.trackers.track("sample", sample(1))
        launch.steps(1)
        facts = {"evaluation": "teacher one", "set": "sums", "step": 1, "time": 1.0}
        launch.trackers.track("evaluation", {**facts, "pass_at_1": 0.5})
        launch.trackers.track("event", {"event": "of no tracker"})
        launch.trackers.track("report", {"steps": 1})
        launch.trackers.close(patience(60))
    first, defined, *rows = launch.told
    assert defined == {"defined": ["*", "step"]}
    assert first["init"]["project"] == "sums" and first["init"]["group"] == "night"
    assert first["init"]["config"]["engines"]["teacher"]["api_key"] == "..." and "hush" not in json.dumps(first)
    assert rows[0] == {"step": 1, "train/tokens": 7.0}
    table = rows[1]["samples"]
    line = dict(zip(table["columns"], table["data"][0], strict=True))
    assert line["response"] == "2" and line["of"] == "training" and line["log_q_minus_log_p"] == -0.25
    assert rows[2] == {"step": 1, "evaluation/teacher/one/sums/pass_at_1": 0.5}
    assert rows[3] == {"finish": 0, "report": {"steps": 1}}
    assert launch.said == [] and not launch.lost
    assert "a word of the package" in (launch.folder / "logs/tracker-wandb.log").read_text()


def test_a_resumed_run_goes_on_in_the_same_run_without_a_step_twice(tmp_path: Path) -> None:
    first = Launch(tmp_path)
    with first.trackers:
        first.steps(1, 2, 3)
        first.trackers.close(patience(60))
    second = Launch(tmp_path)
    with second.trackers:
        second.trackers.track("rewind", 2)
        second.steps(3, 4, tokens=9)
        second.trackers.close(patience(60))
    told = second.told
    assert [row["init"]["id"] for row in told if "init" in row] == [None, "first"]
    assert [(row["step"], row["train/tokens"]) for row in told if "step" in row] == [(1, 7), (2, 7), (3, 7), (4, 9)]
    assert [row["finish"] for row in told if "finish" in row] == [1, 1], "neither has come to its end"


def test_what_can_be_taken_back_is_told_again(tmp_path: Path) -> None:
    class Sink:
        id = "one"
        rows: ClassVar[list[tuple[int, float]]] = []

        def log(self, step: int, values: dict[str, float], at: float) -> None:
            self.rows.append((step, values["train/tokens"]))

        def rewind(self, step: int) -> bool:
            self.rows[:] = [row for row in self.rows if row[0] <= step]
            return True

    feeder = Feeder(Sink(), tmp_path / "state.json", {})  # type: ignore[arg-type]
    for step in (1, 2, 3):
        feeder.take("step", {"step": step, "time": 0.0, "tokens": 7})
    feeder.take("rewind", 1)
    for step in (2, 3):
        feeder.take("step", {"step": step, "time": 0.0, "tokens": 9})
    assert Sink.rows == [(1, 7.0), (2, 9.0), (3, 9.0)]
    assert json.loads((tmp_path / "state.json").read_text()) == {"id": "one", "newest": {"step": 3}}


def test_what_it_raises_is_said_once_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD", "raise")
    launch = Launch(tmp_path)
    with launch.trackers:
        launch.steps(1, 2, 3)
        launch.trackers.close(patience(60))
    assert [row["step"] for row in launch.told if "step" in row] == [1, 3]
    assert launch.lost == {"wandb": 1}
    log = launch.folder / "logs/tracker-wandb.log"
    assert launch.said == [
        f"warning: tracker wandb: SystemExit: no room at the other side, for step 2; the run goes on, see {log}",
        "warning: tracker wandb has not got 1 rows; metrics.jsonl has all of them",
    ]


def test_one_that_hangs_is_killed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD", "hang")
    launch = Launch(tmp_path)
    with launch.trackers:
        launch.steps(*range(1, 5000))  # more than queue and pipe take
        launch.trackers.close(0.5)
    assert launch.lost["wandb"] > 1000
    assert "it is slower than the run; the run goes on" in launch.said[0] and len(launch.said) == 2


def test_one_that_dies_or_never_begins_costs_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD", "die")
    launch = Launch(tmp_path)
    with launch.trackers:
        launch.steps(1)
        launch.trackers.close(patience(60))
    assert "its process has ended with code 7; the run goes on" in launch.said[0]
    monkeypatch.setenv("TOLD", "no login")
    launch = Launch(tmp_path)
    with launch.trackers:
        launch.steps(1)
        launch.trackers.close(patience(60))
    assert "ValueError: no login; the run goes on" in launch.said[0]


def test_figures_of_a_row() -> None:
    row = {"a": 1, "b": None, "c": [1], "d": {"e": 0.5, "f": "text"}, "g": True}
    assert dict(numbers(row)) == {"a": 1.0, "d/e": 0.5}
    assert public({"a": {"api_key": "x", "admin_api_key": None}}) == {"a": {"api_key": "...", "admin_api_key": None}}


def test_what_is_not_there_is_said_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def problems(*overrides: str) -> list[str]:
        return list(tracker_problems(topology(tmp_path, *overrides)))

    assert problems() == []
    assert problems("tracking.trackers=[wandb, wandb]") == ["tracking.trackers: wandb twice; write it once"]
    assert problems("tracking.python=nowhere/python") == [
        "tracking.python: no file nowhere/python; write the path of a Python that has the trackers' packages"
    ]
    monkeypatch.setenv("TOLD", "no login")
    assert problems("tracking.offline=true") == []
    assert problems() == [
        "tracking.trackers: wandb has no login on this machine; run `wandb login`, set WANDB_API_KEY, or write "
        "tracking.offline: true"
    ]
    (tmp_path / "packages/wandb.py").write_text("raise ImportError('no module of the name')")
    assert problems() == [
        "tracking.trackers: wandb cannot be imported (no module of the name); install it (pip install wandb), or name "
        "a Python that has it"
    ]
    (tmp_path / "packages/wandb.py").write_text("import os; os._exit(3)")
    (found,) = problems()
    assert found.startswith("tracking.trackers: wandb ends the process that imports it with code 3")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "packages/mlflow.py").write_text("")
    (found,) = problems("tracking.trackers=[mlflow]")
    assert found == "tracking.trackers: mlflow has no server; set MLFLOW_TRACKING_URI, or write tracking.offline: true"
