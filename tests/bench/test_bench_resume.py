"""The benchmark of going back, on short runs: a start reads the same however long the run was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opd_async.bench import resume
from opd_async.run.trained import read_trained


def bytes_read() -> int:
    """By this process so far, from files and everything else."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_a_start_reads_as_much_after_many_steps_as_after_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_back, read = resume.go_back, list[int]()

    def counted(plan: Any) -> Any:
        before = bytes_read()
        found = go_back(plan)
        read.append(bytes_read() - before)
        return found

    monkeypatch.setattr(resume, "go_back", counted)
    rows = [resume.measure(tmp_path, steps, 24) for steps in (700, 701, 2800)]
    assert [row.steps for row in rows] == [700, 701, 2800]
    files = (tmp_path / "steps-2800").glob("*.jsonl")
    # the first may read what is imported on first use; all read a block for the last line's end
    assert read[2] - read[1] < 2000 < sum(file.stat().st_size for file in files) / 50
    assert [step.version for step in read_trained(tmp_path / "steps-2800")] == list(range(2800)), (
        "cut at the checkpoint"
    )
    assert all(row.trained_bytes < row.text_bytes / 2 for row in rows)


def test_the_command_prints_a_line_for_each_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume.main(["--steps", "3,5", "--ranges", "4", "--json", str(tmp_path / "rows.json")])
    head, *lines, units = capsys.readouterr().out.splitlines()
    assert "trained.jsonl" in head and [line.split()[0] for line in lines] == ["3", "5"] and "milliseconds" in units
    assert [row["steps"] for row in json.loads((tmp_path / "rows.json").read_text())] == [3, 5]
