"""The addition task and its data files: right labels, a clean split, the same bytes every time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from deadlines import patience
from hypothesis import given, settings
from hypothesis import strategies as st
from make_data import main, write_data
from task import (
    ALPHABET,
    RESPONSE_TOKENS,
    Problem,
    draw,
    held_out_problems,
    is_correct,
    parse_prompt,
    read_rows,
    response_tokens,
)

numbers = st.integers(min_value=0, max_value=999)


def test_example() -> None:
    problem = Problem(347, 589)
    assert problem.prompt == "347+589="
    assert problem.answer == "7+9+0=16,4+8+1=13,3+5+1=09:0936"
    assert problem.other_answer == "0+9+7=16,1+8+4=13,1+5+3=09:0936"
    assert problem.row() == {"prompt": "347+589=", "label": "0936", "metadata": {"a": 347, "b": 589}}


@settings(deadline=None, max_examples=60)
@given(numbers, numbers)
def test_answer_is_right_and_fits(a: int, b: int) -> None:
    problem = Problem(a, b)
    assert int(problem.label) == a + b
    assert is_correct(problem.answer, problem.label)
    assert is_correct(problem.other_answer, problem.label)
    assert len(problem.answer) + 1 == len(problem.other_answer) + 1 == RESPONSE_TOKENS
    assert set(problem.prompt + problem.answer) <= set(ALPHABET)
    assert parse_prompt(problem.prompt) == problem
    # the columns, read back from the highest digit down, spell the sum
    columns = [column.split("=")[1] for column in problem.answer.partition(":")[0].split(",")]
    assert columns[-1][0] + "".join(column[1] for column in reversed(columns)) == problem.label


def test_longer_numbers() -> None:
    problem = Problem(123456, 987654, 6)
    assert problem.prompt == "123456+987654=" and problem.label == "1111110"
    assert is_correct(problem.answer, problem.label) and parse_prompt(problem.prompt) == problem
    assert len(problem.answer) + 1 == response_tokens(6) == 62
    assert {len(found.prompt) for found in draw(30, seed=0, held_out=True, digits=6)} == {14}


@pytest.mark.parametrize(
    "response",
    ["", "0936", ":0936", "7+9+0=16:936", "7+9+0=16:0936:0936", "7+9+0=16:09360", "7+9+0=16:0937", "7+9+0=16:"],
)
def test_wrong_responses(response: str) -> None:
    assert not is_correct(response, "0936")


@pytest.mark.parametrize("prompt", ["", "347+589", "47+589=", "347+589= ", "347-589=", "3470+589=", "٣٤٧+589="])
def test_malformed_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="not an addition prompt"):
        parse_prompt(prompt)


@pytest.mark.parametrize(("a", "b"), [(-1, 0), (0, 1000)])
def test_numbers_out_of_range_are_refused(a: int, b: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 999"):
        Problem(a, b)


def test_draw_is_deterministic_and_has_prefixes() -> None:
    assert draw(50, seed=3, held_out=False) == draw(80, seed=3, held_out=False)[:50]
    assert draw(50, seed=3, held_out=False) != draw(50, seed=4, held_out=False)
    assert held_out_problems(20) == held_out_problems(30)[:20]


@pytest.mark.parametrize(("count", "held_out"), [(0, False), (10**6, False), (60_000, True)])
def test_draw_refuses_impossible_counts(count: int, held_out: bool) -> None:
    with pytest.raises(ValueError, match="cannot draw"):
        draw(count, seed=0, held_out=held_out)


def test_splits_are_distinct_and_disjoint(tmp_path: Path) -> None:
    train_file, held_out_file = write_data(tmp_path, seed=0, train=20_000, held_out=1000, parquet=False)
    train, held_out = list(read_rows(train_file)), list(read_rows(held_out_file))
    assert len(set(train)) == 20_000
    assert len(set(held_out)) == 1000
    assert not set(train) & set(held_out)
    assert not any(problem.held_out for problem in train)
    assert all(problem.held_out for problem in held_out)


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    first = write_data(tmp_path / "1", seed=0, train=300, held_out=50, parquet=True)
    again = write_data(tmp_path / "2", seed=0, train=300, held_out=50, parquet=True)
    other = write_data(tmp_path / "3", seed=1, train=300, held_out=50, parquet=False)
    assert [path.name for path in first] == ["train.jsonl", "train.parquet", "held_out.jsonl", "held_out.parquet"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert other[0].read_bytes() != first[0].read_bytes()
    assert other[1].read_bytes() == first[2].read_bytes(), "the held-out set must not depend on the seed"
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == sorted(path.name for path in first)


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    jsonl, parquet, *_ = write_data(tmp_path, seed=0, train=40, held_out=5, parquet=True)
    assert pq.read_table(parquet).to_pylist() == [json.loads(line) for line in jsonl.read_text().splitlines()]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"label": "0936"}',
        '{"prompt": "347+58=", "label": "0405", "metadata": {"a": 347, "b": 58}}',
        '{"prompt": "347+589=", "label": "0937", "metadata": {"a": 347, "b": 589}}',
        '{"prompt": "347+589=", "label": "0936", "metadata": {"a": 347, "b": 590}}',
    ],
)
def test_broken_lines_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(Problem(1, 2).row()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:2: .*make_data"):
        list(read_rows(path))


def test_command_line(addition: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(addition / "make_data.py"), "--out", str(tmp_path), "--train", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience(60), check=True)
    assert done.stdout.split() == [str(tmp_path / "train.jsonl"), str(tmp_path / "held_out.jsonl")]
    assert len(list(read_rows(tmp_path / "held_out.jsonl"))) == 1000


def test_command_line_names_what_cannot_be_met(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--held-out", "70000"]) == 2
    assert "different held-out problems; the split has room for" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
