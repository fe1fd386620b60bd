"""Which ids student and teachers share, what of their tokenizers may differ, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import WORDS, make_model, small_topology, write_json, write_lines

from opd_async.checks.inputs import read_inputs
from opd_async.checks.validation import validate
from opd_async.data.tokenizer import Tokenizer
from opd_async.data.vocabulary import Difference, allowance, describe, differences, read_tables
from opd_async.errors import InputError
from opd_async.plan.resolve import make_plan


@pytest.mark.parametrize(("student", "teacher", "shared"), [(32, 96, 32), (96, 32, 32), (32, 32, 32)])
def test_tables_may_differ_in_size(tmp_path: Path, student: int, teacher: int, shared: int) -> None:
    topology = small_topology(tmp_path)
    make_model(tmp_path / "student", vocab_size=student)
    make_model(tmp_path / "teacher", vocab_size=teacher)
    assert validate(topology) == []
    plan = make_plan(topology)
    assert plan.vocab_size == read_tables(topology).shared == shared
    assert (plan.student_rows, plan.teacher_rows) == (student, {"teacher": teacher})
    assert plan.table_rows(plan.student_engines[0]) == student
    assert plan.table_rows(plan.teacher_engines[0]) == teacher


def test_a_teacher_inside_the_learner_counts_and_one_that_is_not_asked_does_not(tmp_path: Path) -> None:
    inside = small_topology(tmp_path, "opd.use_opd=true", "opd.type=megatron", f"opd.teacher_load={tmp_path}")
    off = small_topology(tmp_path, "opd.use_opd=false")
    make_model(tmp_path / "teacher", vocab_size=24)
    assert read_tables(inside).teachers == {"teacher": 24} and read_tables(inside).shared == 24
    assert read_tables(off).teachers == {} and read_tables(off).shared == 32


def test_a_renamed_token_is_named_and_accepted_by_name(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    make_model(tmp_path / "teacher", words=[*WORDS[:-1], "<think>"])
    (line,) = validate(topology)
    assert line == (
        "models.teacher.path: tokens differ from the student's at 1 ids: 22 is '9' for the student "
        "and '<think>' for the teacher; choose a model with the student's tokens, or, where these ids may be taken for "
        "what they are there, write models.allow_token_differences: ['9']"
    )
    for name, count in (("9", 0), ("<think>", 0), ("8", 1)):
        topology = small_topology(tmp_path, f"models.allow_token_differences=['{name}']")
        make_model(tmp_path / "teacher", words=[*WORDS[:-1], "<think>"])
        assert len(validate(topology)) == count


def tokenizers(tmp_path: Path, student: list[str], teacher: list[str]) -> tuple[Tokenizer, Tokenizer]:
    return Tokenizer(make_model(tmp_path / "s", words=student)), Tokenizer(make_model(tmp_path / "t", words=teacher))


def test_what_is_a_difference(tmp_path: Path) -> None:
    more = [*WORDS, "x", "y"]
    # a teacher's tokens at ids of the student's table, and those beyond it, which no student samples
    own, other = tokenizers(tmp_path, WORDS, more)
    assert differences(own, other, 32) == [Difference(23, None, "x"), Difference(24, None, "y")]
    assert differences(own, other, 24) == [Difference(23, None, "x")]
    assert differences(own, other, 23) == []
    # a student's tokens that the teacher has no token for, and no row either
    own, other = tokenizers(tmp_path, more, WORDS)
    assert differences(own, other, 32) == [Difference(23, "x", None), Difference(24, "y", None)]
    assert differences(own, other, 24) == [Difference(23, "x", None), Difference(24, "y", None)]
    assert differences(own, other, 24, ["x"]) == [Difference(24, "y", None)]
    assert differences(own, other, 24, ["y", "x"]) == []


def test_a_message_names_the_first_differences() -> None:
    found = [Difference(index, "a", None) for index in range(7)]
    assert describe(found[:1]) == "0 is 'a' for the student and no token for the teacher"
    assert describe(found).endswith("4 is 'a' for the student and no token for the teacher and 2 more")
    assert allowance(found) == "['a', 'a', 'a', 'a', 'a', ...]"
    assert allowance([Difference(3, None, "b")]) == "['b']"


def test_responses_must_be_able_to_end(tmp_path: Path) -> None:
    topology = small_topology(tmp_path)
    make_model(tmp_path / "student", vocab_size=40)
    write_json(tmp_path / "student" / "generation_config.json", {"eos_token_id": [2, 35]})
    (line,) = validate(topology)
    assert line.startswith("models.student.path: its responses end with [35], but a teacher's table has 32 rows")
    make_model(tmp_path / "teacher", vocab_size=40)
    assert validate(topology) == []


def test_a_prompt_with_an_id_that_a_teacher_has_not_is_refused(tmp_path: Path) -> None:
    accepted = "models.allow_token_differences=['8', '9']"
    given = small_topology(
        tmp_path, accepted, f"data.completions.path={tmp_path / 'given.jsonl'}", "opd.gkd_lambda=0.5"
    )
    allowed = small_topology(tmp_path, accepted)
    make_model(tmp_path / "teacher", words=WORDS[:-2], vocab_size=21)
    assert validate(allowed) == []
    write_lines(tmp_path / "train.jsonl", {"prompt": "7"}, {"prompt": "a8"})
    with pytest.raises(InputError, match=r"train.jsonl:2: the prompt holds token id 21, and a teacher's table has 21"):
        read_inputs(allowed)
    write_lines(tmp_path / "train.jsonl", {"prompt": "7"}, {"prompt": "ab"})
    assert len(read_inputs(allowed).prompts.prompts) == 2
    write_lines(tmp_path / "given.jsonl", {"prompt": "7", "completion": "ab9"})
    with pytest.raises(InputError, match=r"given.jsonl: row 1: the response holds token id 22"):
        read_inputs(given)
