"""The launcher's words: what happens to a terminal never happens to the run."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import TextIO

import pytest

from opd_async.data.jsonl import JsonlRecord, read_jsonl
from opd_async.telemetry import terminal as terminal_module
from opd_async.telemetry.terminal import Terminal, encoded


def end_of(descriptor: int, encoding: str = "utf-8") -> TextIO:
    return os.fdopen(descriptor, "w", encoding=encoding)


def lines(path: Path) -> list[str]:
    """Of a log, without its header, and without the date and time before each line that was said."""
    header, *rest = path.read_text(encoding="utf-8").splitlines()
    assert header.startswith("=== launch started ")
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in rest]


def test_lines_go_to_their_streams_and_to_the_log(tmp_path: Path) -> None:
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    with end_of(out_end) as stdout, end_of(err_end) as stderr, Terminal(stdout, stderr) as terminal:
        terminal.say("before the log")
        terminal.keep_in(tmp_path / "logs" / "launcher.log")
        terminal.say("one\ntwo")
        print("a record", file=terminal.errors)
    with os.fdopen(out) as said, os.fdopen(err) as complained:
        assert said.read() == "before the log\none\ntwo\n" and complained.read() == "a record\n"
    log = tmp_path / "logs" / "launcher.log"
    assert lines(log) == ["before the log", "one", "two", "a record"]
    assert len(re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", log.read_text(), re.MULTILINE)) == 3, "one for each call"
    assert (tmp_path / "logs" / "launcher.log").stat().st_mode & 0o077 == 0, "it may quote prompts"


def test_a_closed_pipe_is_said_once(tmp_path: Path) -> None:
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    os.close(out)
    log = tmp_path / "launcher.log"
    with end_of(out_end) as stdout, end_of(err_end) as stderr:
        terminal = Terminal(stdout, stderr)
        terminal.keep_in(log)
        for word in ("one", "two"):
            terminal.say(word)
        terminal.close()
    with os.fdopen(err) as complained:
        gone = "stdout is gone (Broken pipe); the run goes on without it"
        assert complained.read() == f"{gone}\n"
    assert sorted(lines(log)) == ["one", gone, "two"]


def test_a_full_disk_is_said_once_and_nothing_is_raised() -> None:
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    with end_of(out_end) as stdout, end_of(err_end) as stderr, Terminal(stdout, stderr) as terminal:
        terminal.keep_in(Path("/dev/full"))
        terminal.say("one")
        terminal.say("two")
    with os.fdopen(out) as said, os.fdopen(err) as complained:
        assert said.read() == "one\ntwo\n"
        (line,) = complained.read().splitlines()
    assert line == "log /dev/full cannot be written: No space left on device; the run goes on without it"


def test_a_reader_that_does_not_read_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal_module, "MAX_WAITING", 3)
    out, out_end = os.pipe()
    stdout = end_of(out_end)
    terminal = Terminal(stdout, stdout)
    log = tmp_path / "launcher.log"
    terminal.keep_in(log)
    line = "x" * 4096
    for _ in range(100):  # a pipe holds 16 of them
        terminal.say(line)
    text: list[str] = []

    def read() -> None:
        with os.fdopen(out) as pipe:
            text.append(pipe.read())

    reader = threading.Thread(target=read)
    reader.start()
    terminal.say("the end")
    terminal.close()
    stdout.close()
    reader.join()
    assert "the terminal does not read; lines from here on may stand in this log only" in lines(log)
    assert lines(log).count(line) == 100, "the log has everything"
    assert "lines were left out here" in text[0] or "the end" not in text[0]


@pytest.mark.parametrize(
    ("text", "encoding", "found"),
    [
        ("━━ 5 %", "utf-8", "━━ 5 %".encode()),
        ("━━ naïve ─", "ascii", b"== na\\xefve -"),
        ("━ naïve", "latin-1", b"= na\xefve"),
        ("a file \udcff", "utf-8", b"a file \\udcff"),
    ],
)
def test_every_encoding_can_print_every_line(text: str, encoding: str, found: bytes) -> None:
    assert encoded(text, encoding) == found


def test_streams_that_are_closed_from_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    with Terminal() as terminal:
        terminal.keep_in(tmp_path / "launcher.log")
        terminal.say("still here")
    assert lines(tmp_path / "launcher.log") == ["still here"]


def test_a_record_without_room_is_said_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    record = JsonlRecord(tmp_path / "metrics.jsonl", said.append)
    record.write({"step": 1})
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[:3])

    monkeypatch.setattr(os, "write", full)
    record.write({"step": 2})
    record.write({"step": 3})
    monkeypatch.undo()
    record.write({"step": 4})
    record.close()
    assert record.lost == 2
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 4]
    assert said == [f"{tmp_path}/metrics.jsonl cannot be written: No space left on device; rows are missing in it from "
                    "here on"]  # fmt: skip


def test_a_record_that_cannot_be_opened_counts_what_is_missing(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "metrics.jsonl").mkdir()
    record = JsonlRecord(tmp_path / "metrics.jsonl", said.append, 0)
    record.write({"step": 3})
    record.write({"step": 4})
    record.close()
    assert record.lost == 2 and record.size == 0 and len(said) == 1 and "Is a directory" in said[0]
