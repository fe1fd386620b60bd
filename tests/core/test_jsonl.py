"""JSON lines: whole lines whatever happens."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_async.data.jsonl import JsonlRecord, JsonlWriter, read_jsonl
from opd_async.errors import InputError


def test_rows_are_there_at_once_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"step": 1, "note": "two\nlines"})
        assert list(read_jsonl(path)) == [{"step": 1, "note": "two\nlines"}]
    with JsonlWriter(path) as writer:
        writer.write({"step": 2})
    writer.close()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=20), max_size=5), st.integers(0, 200))
def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path: Path, notes: list[str], cut: int) -> None:
    path = tmp_path / "cut.jsonl"
    path.unlink(missing_ok=True)
    with JsonlWriter(path) as writer:
        for note in notes:
            writer.write({"note": note})
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    whole = notes[: data.count(b"\n")]
    assert [row["note"] for row in read_jsonl(path)] == whole
    with JsonlWriter(path) as writer:
        writer.write({"note": "after"})
    assert [row["note"] for row in read_jsonl(path)] == [*whole, "after"]


def test_a_long_half_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    JsonlWriter(path).close()
    assert path.read_bytes() == b'{"a": 1}\n'


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "nan.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"loss": float("nan"), "nested": {"values": [1.5, float("inf")]}, "text": "x"})
    assert list(read_jsonl(path)) == [{"loss": None, "nested": {"values": [1.5, None]}, "text": "x"}]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "full.jsonl"
    write = os.write
    with JsonlWriter(path) as writer:
        writer.write({"step": 1})
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
        with pytest.raises(OSError) as caught:
            writer.write({"step": 2})
        monkeypatch.undo()
        writer.write({"step": 3})
    assert caught.value.errno == errno.ENOSPC
    assert [row["step"] for row in read_jsonl(path)] == [1, 3]


def test_a_record_is_cut_in_place_and_goes_on(tmp_path: Path) -> None:
    path, said = tmp_path / "cut.jsonl", list[str]()
    record, sizes = JsonlRecord(path, said.append, 0), list[int]()
    for step in range(4):
        record.write({"step": step})
        sizes.append(record.size)
    record.close()
    number = path.stat().st_ino
    again = JsonlRecord(path, said.append, sizes[1])
    assert [row["step"] for row in read_jsonl(path)] == [0, 1] and again.size == sizes[1]
    again.write({"step": 7})
    again.sync()
    again.close()
    assert [row["step"] for row in read_jsonl(path)] == [0, 1, 7] and said == []
    assert [row["step"] for row in read_jsonl(path, sizes[0])] == [1, 7]
    longer = JsonlRecord(path, said.append, 10_000)  # somebody has cut it shorter than a checkpoint says
    longer.close()
    assert [row["step"] for row in read_jsonl(path)] == [0, 1, 7]
    assert path.stat().st_ino == number, "never another file, not even for a moment"


@pytest.mark.parametrize(("text", "message"), [("{]\n", "bad.jsonl:1: not JSON"), ("[1]\n", "not list")])
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        list(read_jsonl(path))
