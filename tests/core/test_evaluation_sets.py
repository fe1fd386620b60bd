"""Evaluation sets by name: what each of them has of `evaluation`, and what is wrong with some."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import small_topology, topology_data, write_lines, write_topology

from opd_async.checks.findings import longest_of, what_was_read
from opd_async.checks.inputs import examine, read_inputs
from opd_async.checks.validation import validate, warnings
from opd_async.config.resuming import Change, may_change
from opd_async.config.topology import Topology
from opd_async.errors import InputError
from opd_async.plan.resolve import make_plan
from opd_async.run.fingerprints import fingerprints
from opd_async.run.run_folder import prepare


def with_sets(root: Path, **sets: dict[str, Any]) -> Path:
    """A topology file with these sets, of which each has a file with a label, unless it says otherwise."""
    data = topology_data(root)
    for name, one in sets.items():
        if "path" not in one:
            one["path"] = str(write_lines(root / f"{name}.jsonl", {"prompt": "abcde", "label": "3"}))
    data["evaluation"] = {"temperature": 0.5, "max_response_tokens": 16, "sets": sets}
    return write_topology(root, data)


def refused(file: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        examine(file, overrides, lambda line: None)
    return str(caught.value)


def test_what_a_set_leaves_out_is_as_in_the_section(tmp_path: Path) -> None:
    own = {"judge": "teacher", "temperature": 1.0, "prompts": 7, "max_response_tokens": 20}
    topology, inputs = examine(with_sets(tmp_path, sums={}, words=own), (), lambda line: None)
    sums, words = topology.evaluation_sets.values()
    assert (sums.name, sums.judge, sums.temperature, sums.prompts) == ("sums", "answer", 0.5, 1000)
    assert (words.name, words.judge, words.temperature, words.prompts) == ("words", "teacher", 1.0, 7)
    assert [(one.max_response_tokens, one.max_prompt_tokens) for one in (sums, words)] == [(16, 48), (20, 44)]
    assert sums.where("judge") == "evaluation.judge" and words.where("judge") == "evaluation.sets.words.judge"
    assert {name: len(found.prompts) for name, found in inputs.held_out.items()} == {"sums": 1, "words": 1}
    assert longest_of(topology, inputs).held_out == (6, 20)
    lines = list(what_was_read(topology, inputs))
    assert f"evaluation.sets.words: {tmp_path}/words.jsonl: 1 prompts, " in lines[4]
    assert lines[4].endswith("; judge teacher")


def test_a_teacher_that_judges_reads_what_it_reads_in_training(tmp_path: Path) -> None:
    """Unless a set says otherwise; it has room for the longest response of the set. What a resumed run compares of the
    prompts does not depend on who judges."""
    judged = {"judge": "teacher", "temperature": 1.0}
    file = with_sets(tmp_path, told=judged | {"max_response_tokens": 40}, plain=judged | {"teacher_prompt": False})
    write_lines(tmp_path / "train.jsonl", {"prompt": "ab", "hint": "c"})
    for name in ("told", "plain"):
        write_lines(tmp_path / f"{name}.jsonl", {"prompt": "abc", "hint": "d" * 14})
    hinted = ["data.privileged_key=hint"]
    topology, inputs = examine(file, hinted, lambda line: None)
    (told,), (plain,) = (inputs.held_out[name].prompts for name in ("told", "plain"))
    assert told.teacher_ids is not None and len(told.teacher_ids) == 1 + 3 + 14 and plain.teacher_ids is None
    assert longest_of(topology, inputs).teachers == 18 + 40 - 32

    def digests(*overrides: str) -> dict[str, str]:
        run, read = examine(file, [*hinted, *overrides], lambda line: None)
        return fingerprints(run, read.prompts, read.held_out, read.completions)

    assert digests() == digests("evaluation.sets.told.teacher_prompt=false")
    write_lines(tmp_path / "told.jsonl", {"prompt": "abc", "hint": "d" * 21})
    assert "told.jsonl: 1 rows are too long for their teacher, row 1 most: the teacher's prompt has 25" in refused(
        file, *hinted
    )
    write_lines(tmp_path / "told.jsonl", {"prompt": "abc"})
    assert "the text that only the teacher is shown is missing: no 'hint' in the row" in refused(file, *hinted)


def test_held_out_prompts_are_a_set_like_the_others(tmp_path: Path) -> None:
    held_out = write_lines(tmp_path / "held_out.jsonl", {"prompt": "ab", "label": "3"})
    topology = small_topology(tmp_path, f"data.held_out.path={held_out}", f"evaluation.sets.sums.path={held_out}")
    first, second = topology.evaluation_sets.values()
    assert (first.name, first.key) == ("held_out", "data.held_out") and second.key == "evaluation.sets.sums"
    assert validate(topology) == warnings(topology) == []
    assert warnings(small_topology(tmp_path, "evaluation.every_steps=2")) != []
    assert warnings(small_topology(tmp_path, "evaluation.every_steps=2", f"evaluation.sets.a.path={held_out}")) == []


SUMS = {"judge": "answer"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"judge": "reward"}, "evaluation.sets.bad.judge: reward, but there is none; write reward.kind, or answer"),
    (
        {"judge": "teacher"},
        "evaluation.temperature: 0.5, but evaluation.sets.bad.judge: teacher compares distributions at temperature 1",
    ),
    ({"answer_pattern": "abc"}, "evaluation.sets.bad.answer_pattern: 'abc' has no group"),
    (
        {"answer_pattern": "(.*)", "judge": "teacher", "temperature": 1.0},
        "evaluation.sets.bad.answer_pattern: only for judge answer, this is teacher; remove it",
    ),
    ({"teacher_topk": 8}, "evaluation.sets.bad.teacher_topk: only for judge teacher, this is answer; remove it"),
    ({"teacher_prompt": False}, "evaluation.sets.bad.teacher_prompt: only for judge teacher, this is answer; remove"),
    ({"max_response_tokens": 64}, "evaluation.sets.bad.max_response_tokens: 64 leaves no room for a prompt in"),
    ({"path": "nowhere.jsonl"}, "evaluation.sets.bad.path: no file nowhere.jsonl"),
    ({"label_key": "answer"}, "have no label under 'answer', which evaluation.judge answer compares responses with"),
    ({"judge": "answers"}, "evaluation.sets.bad.judge: "),
    ({"split": "test"}, "evaluation.sets.bad.split: "),
    ({"promts": 3}, "evaluation.sets.bad.promts: unknown key; did you mean prompts?"),
]


@pytest.mark.parametrize(("bad", "text"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_a_set_without_what_it_needs_is_one_error_with_its_line(tmp_path: Path, bad: dict[str, Any], text: str) -> None:
    """Beside a set with which nothing is wrong."""
    file = with_sets(tmp_path, sums=dict(SUMS), bad=dict(bad))
    count, *lines = refused(file).splitlines()
    assert count == f"{file}: 1 problem" and len(lines) == 1 and text in lines[0]
    number = int(lines[0].split()[1].rstrip(":"))
    written = [line.strip().rstrip(":") for line in file.read_text().splitlines()]
    if text.startswith("evaluation.temperature"):
        assert written[number - 1] == "temperature: 0.5" and number - 1 < written.index("sets")
    else:
        assert number - 1 >= written.index("bad")
        assert written[number - 1].split(":")[0] in (next(iter(bad)), "bad", "path"), lines


@pytest.mark.parametrize("rows", [(), ("{",), ({"prompt": "a" * 60, "label": "1"},)], ids=["empty", "broken", "long"])
def test_a_file_without_a_prompt_is_named_with_its_set(tmp_path: Path, rows: tuple[Any, ...]) -> None:
    path = write_lines(tmp_path / "bad.jsonl", *rows)
    text = refused(with_sets(tmp_path, sums={}, bad={"path": str(path)}))
    assert "1 problem" in text and f"evaluation.sets.bad.path: {path}" in text


def test_names(tmp_path: Path) -> None:
    held_out = write_lines(tmp_path / "h.jsonl", {"prompt": "ab", "label": "3"})
    text = refused(with_sets(tmp_path, held_out={}), f"data.held_out.path={held_out}")
    assert "evaluation.sets.held_out: that is the name of data.held_out; write another name" in text
    examine(with_sets(tmp_path, held_out={}), (), lambda line: None)  # alone, it may be called so
    assert "evaluation.sets.a b" in refused(with_sets(tmp_path, **{"a b": {}}))
    file = with_sets(tmp_path, sums={})
    text = file.read_text()
    file.write_text(f"{text.rstrip()}\n    sums: {{path: x.jsonl}}\n")
    assert "sums" in refused(file) and "keep one of them" in refused(file)


def test_a_set_may_come_and_go_and_move_but_keeps_its_rows(tmp_path: Path) -> None:
    def resume(file: Path, *overrides: str, again: bool = True) -> None:
        topology, inputs = examine(file, overrides, lambda line: None)
        found = fingerprints(topology, inputs.prompts, inputs.held_out, inputs.completions)
        prepare(make_plan(topology), resume=again, inputs=found).release()

    both = with_sets(tmp_path, sums={}, words={})
    resume(both, again=False)
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "words.jsonl").read_bytes())
    resume(both, f"evaluation.sets.words.path={tmp_path}/moved.jsonl", "evaluation.sets.words.prompts=3")
    resume(with_sets(tmp_path, sums={}))
    resume(with_sets(tmp_path, sums={}, more={}))
    write_lines(tmp_path / "more.jsonl", {"prompt": "abcde", "label": "4"})
    with pytest.raises(InputError, match=r"other content in these(?s:.*)evaluation.sets.more: ") as caught:
        resume(tmp_path / "topology.yaml")
    assert "sums" not in str(caught.value)
    assert may_change("evaluation.sets.sums.path") is Change.SAME_CONTENT
    assert may_change("evaluation.sets.sums.judge") is Change.YES


def test_labels_are_needed_where_a_set_compares_with_them(tmp_path: Path) -> None:
    unlabelled = write_lines(tmp_path / "u.jsonl", {"prompt": "abc"})
    file = with_sets(tmp_path, words={"path": str(unlabelled), "judge": "teacher", "temperature": 1.0})
    topology, _ = examine(file, (), lambda line: None)
    assert isinstance(topology, Topology) and len(read_inputs(topology).held_out["words"].prompts) == 1
    with pytest.raises(InputError, match=r"which reward\.kind exact_match compares responses with"):
        read_inputs(
            small_topology(
                tmp_path, "reward.kind=exact_match", f"evaluation.sets.u={{path: {unlabelled}, judge: reward}}"
            )
        )
