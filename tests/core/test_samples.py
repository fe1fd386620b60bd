"""Responses for people: what a row says, that writing them never ends a run, and what the page is made of."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_async.cli.main import main as opd
from opd_async.data.jsonl import read_jsonl
from opd_async.errors import InputError
from opd_async.telemetry import samples as samples_module
from opd_async.telemetry.samples import EvaluatedSample, SampleRecord, read_samples, trained_row
from opd_async.telemetry.samples_page import BLOCK, write_page
from opd_async.telemetry.token_text import shown, text_of_tokens
from opd_async.transport.messages import TrainedSample

MIB = 1 << 20


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8; it writes what is no character as the replacement character."""

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return bytes(ids).decode(errors="replace")


def ids(text: str) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(list(text.encode()), np.int32)


def trained(version: int, text: str = "6*7=42", sample: int = 1, *, scored: bool = True) -> TrainedSample:
    """A response in two chunks of weights `version - 1` and `version`, cut behind its second token."""
    response = ids(text)
    count = len(response)
    return TrainedSample(
        version=version,
        sample_id=sample,
        prompt_id=3,
        prompt_tokens=2,
        response_tokens=count,
        finish="stop",
        reward=0.5,
        teacher="teacher",
        prompt=ids("q:"),
        response=response,
        behaviour_logprobs=np.full(count, -0.5, np.float32),
        teacher_logprobs=np.linspace(-1, 0, count).astype(np.float32) if scored else np.zeros(0, np.float32),
        made_at=1000.0,
        chunk_ends=np.array([4, count], np.int32),
        chunk_versions=np.array([version - 1, version], np.int32),
        chunk_made_s=np.array([0, 1.25], np.float32),
        chunk_latency_s=np.array([0.5, 2], np.float32),
        part_ends=np.array([2, count], np.int32),
        part_versions=np.array([version - 1, version], np.int32),
    )


def evaluated(step: int, who: str = "student", name: str = "held_out") -> EvaluatedSample:
    return EvaluatedSample(
        who=who,
        set=name,
        step=step,
        prompt_id=0,
        prompt=ids("q:"),
        response=ids("41"),
        finish="stop",
        label="42",
        right=False,
        reward=None,
    )


def record(folder: Path, *items: Any, largest: int = MIB) -> list[str]:
    """Write these items into `samples.jsonl`; returns what was said."""
    said: list[str] = []
    with SampleRecord(folder / "samples.jsonl", Bytes(), largest, said.append) as writer:
        for item in items:
            writer.rewind(item) if isinstance(item, int) else writer.add(item)
    return said


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "plain", "été", "数学 of 😀", "é"])
def test_each_token_has_its_part_of_the_text(text: str) -> None:
    found = text_of_tokens(Bytes(), ids(text).tolist())
    assert found.text == text and len(found.ends) == len(text.encode())
    want = [len(text.encode()[: n + 1].decode(errors="ignore")) for n in range(len(text.encode()))]
    assert found.ends == want, "a character belongs to the token that completes it"


def test_what_never_becomes_a_character_is_shown_as_it_is() -> None:
    found = text_of_tokens(Bytes(), [0xFF] * 40 + list(b"ok"))
    assert found.text.endswith("ok") and len(found.ends) == 42 and found.ends[-1] == len(found.text)
    assert found.ends == sorted(found.ends)


def test_nothing_that_a_student_writes_can_steer_a_terminal() -> None:
    assert shown("a\n\x1b[2J‮b é") == "a\\n\\x1b[2J\\u202eb é"


# --- rows ------------------------------------------------------------------------------------------------------------


def test_a_row_says_everything_of_a_response() -> None:
    row = trained_row(trained(4), Bytes())
    assert json.loads(json.dumps(row)) == row, "plain values"
    assert (row["step"], row["sample"], row["prompt"], row["response"]) == (5, 1, "q:", "6*7=42")
    assert row["ends"] == [1, 2, 3, 4, 5, 6] and row["response_tokens"] == 6 and row["prompt_tokens"] == 2
    assert row["student_logprobs"] == [-0.5] * 6
    assert row["teacher_logprobs"] == [-1.0, -0.8, -0.6, -0.4, -0.2, 0.0]
    assert row["chunks"] == [[4, 3, 0.0, 0.5], [6, 4, 1.25, 2.0]] and row["parts"] == [[2, 4], [6, 5]]
    assert trained_row(trained(4, scored=False), Bytes())["teacher_logprobs"] is None


def test_rows_are_written_for_their_owner_and_the_first_of_each_kind_is_said(tmp_path: Path) -> None:
    said = record(tmp_path, evaluated(0), evaluated(0), trained(0), trained(0, "yes\n"), evaluated(5))
    rows = list(read_jsonl(tmp_path / "samples.jsonl"))
    assert [row.get("evaluation", row["step"]) for row in rows] == ["student", "student", 1, 1, "student"]
    assert (tmp_path / "samples.jsonl").stat().st_mode & 0o077 == 0
    assert [line.partition(",")[0] for line in said] == [
        "a response of the student at step 0",
        "a response of step 1",
        "a response of the student at step 5",
    ]
    assert "mean log q - log p 0.000, reward 0.5" in said[1] and "response  6*7=42" in said[1]
    assert "wrong" in said[0]


def test_a_run_that_goes_back_shows_no_response_twice(tmp_path: Path) -> None:
    record(tmp_path, 0, trained(0), trained(1), trained(2))
    assert len(list(read_jsonl(tmp_path / "samples.jsonl"))) == 3, "a new run has nothing to go back behind"
    record(tmp_path, 2, trained(2, "again"), trained(3))
    rows = [row for _, row in read_samples(tmp_path / "samples.jsonl")]
    assert [(row["step"], row["response"]) for row in rows] == [
        *((1, "6*7=42"), (2, "6*7=42"), (3, "again"), (4, "6*7=42")),
    ]


def test_a_file_that_grows_large_is_thinned_and_keeps_the_whole_run_in_sight(tmp_path: Path) -> None:
    items = [trained(version) for version in range(200)]
    said = record(tmp_path, *items, evaluated(200), largest=30_000)
    rows = [row for _, row in read_samples(tmp_path / "samples.jsonl")]
    steps = [row["step"] for row in rows if "sample" in row]
    assert (tmp_path / "samples.jsonl").stat().st_size <= 30_000
    assert steps[0] == 1 and steps[-1] > 190 and len(set(np.diff(steps))) == 1
    assert rows[-1]["evaluation"] == "student" and not [line for line in said if "warning" in line]


def test_a_file_that_cannot_be_thinned_is_full(tmp_path: Path) -> None:
    said = record(tmp_path, *(evaluated(step) for step in range(100)), largest=3_000)
    full = [line for line in said if "warning" in line]
    assert full[0] == "warning: samples.jsonl is full: no more responses go there; raise telemetry.samples_mib"
    assert re.fullmatch(r"warning: samples.jsonl: \d+ responses were left out", full[1]) and len(full) == 2
    assert (tmp_path / "samples.jsonl").stat().st_size < 4_000


def test_nothing_about_a_response_ends_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "samples.jsonl").mkdir()  # nothing can be written
    assert any("cannot be written" in line for line in record(tmp_path, trained(0), trained(1)))
    broken: Any = "no sample"
    said = record(tmp_path / "other", broken, broken, trained(1))
    assert [line for line in said if "cannot be recorded" in line] and "2 responses were left out" in said[-1]
    assert [row["step"] for _, row in read_samples(tmp_path / "other" / "samples.jsonl")] == [2]
    monkeypatch.setattr(samples_module, "MAX_WAITING", 0)
    assert record(tmp_path / "slow", trained(0)) == ["warning: samples.jsonl: 1 responses were left out"]


# --- the page --------------------------------------------------------------------------------------------------------


def element(page: str, name: str) -> str:
    found = re.findall(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert len(found) == 1, name
    return str(found[0])


def unpacked(page: str, block: int) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(element(page, f"block-{block}"))))


def test_the_page_has_everything_inside_and_nothing_of_a_response_acts_in_it(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>😀"
    record(tmp_path, evaluated(0), trained(4, evil), *(trained(version) for version in range(5, 5 + BLOCK)))
    assert write_page(tmp_path, tmp_path / "page.html") == BLOCK + 2
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert (
        "alert(1)</script>" not in page
        and "<noscript>" in page
        and (tmp_path / "page.html").stat().st_mode & 0o077 == 0
    )
    assert not re.search(r"""(src|href)=|https?:|@import|url\(""", page), "nothing is fetched"
    head, index = json.loads(element(page, "head")), json.loads(element(page, "index"))
    rows = [dict(zip(head["columns"], row, strict=True)) for row in index]
    assert (head["name"], head["left_out"]) == (tmp_path.name, 0)
    assert [(row["block"], row["place"]) for row in rows[:2] + rows[-2:]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    first, second = rows[:2]
    assert (first["who"], first["right"], first["worst"], first["wait"]) == ("student", False, None, None)
    assert (second["who"], second["step"], second["tokens"]) == ("training", 5, len(evil.encode()))
    # log p is -.5 throughout, log q goes from -1 to 0; tokens 2 and 3 of weights 3 were trained from weights 4
    assert (second["kl"], second["worst"], second["age"], second["parts"], second["wait"]) == (0.0, 0.5, 1, 2, 2.0)
    assert unpacked(page, 0)[1]["response"] == evil and len(unpacked(page, 1)) == 2


def test_given_tokens_do_not_count_in_a_response_s_distance(tmp_path: Path) -> None:
    row = trained_row(trained(4), Bytes()) | {"given": [[0, 2]]}
    (tmp_path / "samples.jsonl").write_text(f"{json.dumps(row)}\n")
    write_page(tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    columns, (index,) = json.loads(element(page, "head"))["columns"], json.loads(element(page, "index"))
    found = dict(zip(columns, index, strict=True))
    # log p is -.5, log q of the four sampled tokens -.6, -.4, -.2 and 0
    assert (found["kl"], found["worst"]) == (-0.2, 0.1)


def test_a_large_record_becomes_a_page_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    record(tmp_path, *(trained(version) for version in range(100)))
    assert write_page(tmp_path, tmp_path / "page.html", most=30) == 25
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert json.loads(element(page, "head"))["left_out"] == 75


def test_responses_that_were_trained_again_count_nowhere(tmp_path: Path) -> None:
    record(tmp_path, trained(0), trained(1), trained(2))
    record(tmp_path, 1, trained(1))
    assert write_page(tmp_path, tmp_path / "page.html") == 2
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert json.loads(element(page, "head"))["left_out"] == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def code(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            opd(["samples", *words])
        return int(ended.value.code or 0)

    assert code(str(tmp_path)) == 2
    assert "samples.jsonl; a run writes it from its first step on" in capsys.readouterr().err
    record(tmp_path, trained(0))
    assert code(str(tmp_path)) == 0
    assert capsys.readouterr().out == f"1 responses: {tmp_path / 'samples.html'}\n"
    assert code(str(tmp_path), "--output", str(tmp_path / "none" / "a.html")) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert code(str(tmp_path), "--most", "0") == 2
    assert "'0'; write a number, at least 1" in capsys.readouterr().err
    with (tmp_path / "samples.jsonl").open("a") as lines:
        lines.write('{"nothing": "known"}\n')
    assert code(str(tmp_path)) == 2
    assert "samples.jsonl:2: no row about a response" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds no response"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "samples.jsonl").touch()
        write_page(tmp_path / "empty", tmp_path / "page.html")
