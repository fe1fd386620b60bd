"""Rows as data sets write them: chats, tools, keys of tables, nested keys, messages as text, several files."""

from __future__ import annotations

import gzip
import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from chat_rows import CALL, SYSTEM, TEMPLATE, TOOL, TOOLS, USER, expected, load, refused, with_template, write_table
from small_runs import make_model, small_topology, topology_data, write_lines, write_topology

from opd_async.checks.inputs import examine, read_inputs
from opd_async.config.topology import CompletionsSection, Topology
from opd_async.config.topology_file import load_topology
from opd_async.data.completions import load_completions
from opd_async.data.messages import ChatOptions
from opd_async.data.own_prompts import SECTION, OwnPrompts
from opd_async.data.prompts import Reading, TeacherChoice
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError
from opd_async.hooks import HookError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_template(tmp_path_factory.mktemp("forms"), TEMPLATE)


CHATS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ({"prompt": [USER]}, [USER], {}),
    "tool calls without content": ({"prompt": [USER, CALL, TOOL]}, [USER, CALL, TOOL], {}),
    "tool calls, no key content": (
        {"prompt": [USER, {key: value for key, value in CALL.items() if key != "content"}, TOOL]},
        [USER, CALL, TOOL],
        {},
    ),
    "parts": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]}, [USER], {}),
    "null keys": ({"prompt": [USER | {"tool_calls": None, "name": None}]}, [USER], {}),
    "empty tool calls": ({"prompt": [USER | {"tool_calls": []}]}, [USER], {}),
    "tools": ({"prompt": [USER], "tools": TOOLS}, [USER], {"tools": TOOLS}),
    "tools as text": ({"prompt": [USER], "tools": json.dumps(TOOLS)}, [USER], {"tools": TOOLS}),
    "each tool as text": ({"prompt": [USER], "tools": [json.dumps(TOOLS[0])]}, [USER], {"tools": TOOLS}),
    "no tools": ({"prompt": [USER], "tools": []}, [USER], {}),
    "messages as text": ({"prompt": json.dumps([SYSTEM, USER])}, [SYSTEM, USER], {}),
    "messages as text, pretty": ({"prompt": "\n" + json.dumps([SYSTEM, USER], indent=1)}, [SYSTEM, USER], {}),
}


@pytest.mark.parametrize("name", sorted(CHATS))
def test_chats_become_what_transformers_makes_of_them(tmp_path: Path, folder: Path, name: str) -> None:
    row, messages, names = CHATS[name]
    found = load(write_lines(tmp_path / "p.jsonl", row), folder)
    assert found.prompts[0].token_ids.tolist() == expected(folder, messages, **names)


def test_keys_that_a_table_fills_with_null(tmp_path: Path, folder: Path) -> None:
    """In parquet each message has the keys of all messages, each tool those of all, each call's arguments too."""
    tools = [{"name": "a", "d": {"x": "1"}}, {"name": "b"}, {"name": "c", "d": {"y": "1"}}]

    def call(**arguments: str) -> dict[str, Any]:
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }

    chats = [[USER, call(a="1"), TOOL, call(b="2"), TOOL], [SYSTEM, USER]]
    rows = [{"prompt": chats[0], "tools": tools}, {"prompt": chats[1], "tools": None}]
    path = write_table(tmp_path / "p.parquet", rows)
    raw = pyarrow.parquet.read_table(path).to_pylist()[1]["prompt"]
    with pytest.raises(Exception, match=r"one call|no len|NoneType"):
        expected(folder, raw)
    found = load(path, folder)
    wanted = [expected(folder, chats[0], tools=tools), expected(folder, chats[1])]
    assert [prompt.token_ids.tolist() for prompt in found.prompts] == wanted
    inside = write_table(tmp_path / "q.parquet", [{"extra": row} for row in rows])
    deep = load(inside, folder, prompt_key="extra.prompt", tools_key="extra.tools")
    assert [prompt.token_ids.tolist() for prompt in deep.prompts] == wanted


def test_without_a_tools_key_no_tools_are_read(tmp_path: Path, folder: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": [USER], "tools": TOOLS, "more": [{"name": "h"}]})
    assert load(path, folder, tools_key=None).prompts[0].token_ids.tolist() == expected(folder, [USER])
    found = load(path, folder, tools_key="more").prompts[0].token_ids.tolist()
    assert found == expected(folder, [USER], tools=[{"name": "h"}])
    deaf = with_template(tmp_path / "deaf", "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "p.jsonl:1: tools, which the chat template of" in refused(path, deaf)


@pytest.mark.parametrize("in_files", [False, True])
def test_a_template_for_tools_of_its_own(tmp_path: Path, in_files: bool) -> None:
    plain, with_tools = "a{{ messages[0].content }}", "b{{ tools[0].name }}"
    folder = make_model(tmp_path / "model")
    if in_files:
        (folder / "additional_chat_templates").mkdir()
        (folder / "chat_template.jinja").write_text(plain)
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(with_tools)
    else:
        named = [{"name": "tool_use", "template": with_tools}, {"name": "default", "template": plain}]
        with_template(folder, named)
    path = write_lines(tmp_path / "p.jsonl", {"prompt": [USER]}, {"prompt": [USER], "tools": TOOLS})
    found = [prompt.token_ids.tolist() for prompt in load(path, folder).prompts]
    assert found == [expected(folder, [USER]), expected(folder, [USER], tools=TOOLS)] and found[0] != found[1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": [{"role": "user", "content": None}]}, "a chat message needs a role and a content"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "is image, and the models here read text only",
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "input_audio", "text": "a"}]}]}, "is input_audio, and"),
        ({"prompt": [USER, {"role": "assistant", "content": "7"}]}, "an answer and no prompt"),
        ({"prompt": json.dumps([USER, {"role": "assistant", "content": "7"}])}, "an answer and no prompt"),
        ({"prompt": str([SYSTEM, USER])}, "chat messages as Python prints them; write a list, or JSON"),
        ({"prompt": '[{"role": "user", "content": "a" "b"}]'}, "chat messages as text that is no valid JSON"),
        ({"prompt": [USER | {"tool_calls": "f"}]}, "the tool_calls of a message are no list"),
        ({"prompt": [USER], "tools": {"a": 1}}, "the tools are not a list of objects"),
        ({"prompt": [USER], "tools": ["f"]}, "the tools are not a list of objects"),
        ({"prompt": "ab", "tools": TOOLS}, "tools, but the prompt is a plain text"),
        ({"prompt": [USER | {"content": "\udfff"}]}, "makes of the messages holds half of a surrogate pair"),
    ],
)
def test_rows_that_are_refused_with_file_and_line(
    tmp_path: Path, folder: Path, row: dict[str, Any], reason: str
) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a"}, json.dumps(row))
    text = refused(path, folder)
    assert f"{path}:2: " in text and reason in text


@pytest.mark.parametrize("text", ['[{"a": 1}]', "[1, 2", '[{"role": "user"} is JSON', "{ab}", "[]"])
def test_texts_that_are_no_chats_stay_texts(tmp_path: Path, folder: Path, text: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": text})
    assert load(path, folder).prompts[0].token_ids.tolist() == Tokenizer(folder).encode(text)


def test_what_the_topology_says_about_chats(tmp_path: Path, folder: Path) -> None:
    developer = {"role": "developer", "content": "c"}
    rows = [{"prompt": "ab"}, {"prompt": [USER]}, {"prompt": [SYSTEM, USER]}, {"prompt": [developer, USER]}]
    path = write_lines(tmp_path / "p.jsonl", *rows)
    chats = ChatOptions(as_chat=True, system_prompt="j", template_kwargs={"deep": True})
    found = [prompt.token_ids.tolist() for prompt in load(path, folder, chats).prompts]
    own = [{"role": "system", "content": "j"}, USER]
    wanted = (own, own, [SYSTEM, USER], [developer, USER])
    assert found == [expected(folder, messages, deep=True) for messages in wanted]
    assert load(path, folder).prompts[0].token_ids.tolist() == Tokenizer(folder).encode("ab")


def chatty(root: Path, *overrides: str) -> Topology:
    """A topology whose models have the template of this file."""
    data = topology_data(root)
    for side in ("student", "teacher"):
        with_template(root / side, TEMPLATE)
    return load_topology(write_topology(root, data), overrides)


def test_the_topology_reaches_every_kind_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows_as_chats.py").write_text("def rows():\n    return [{'prompt': 'ab', 'label': '1'}]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_lines(tmp_path / "h.jsonl", {"prompt": "ab", "label": "1"})
    write_lines(tmp_path / "c.jsonl", {"prompt": "ab", "completion": "c"})
    settings = ["data.as_chat=true", "data.system_prompt=j", "data.chat_template_kwargs.deep=true"]
    files = ["data.held_out.path=h.jsonl", "data.completions.path=c.jsonl", "data.train.path=h.jsonl"]
    topology = chatty(tmp_path, *settings, *files)
    wanted = expected(tmp_path / "student", [{"role": "system", "content": "j"}, USER], deep=True)
    found = read_inputs(topology)
    prompts = [found.prompts.prompts[0], found.held_out["held_out"].prompts[0], found.completions.completions[0].prompt]
    assert [prompt.token_ids.tolist() for prompt in prompts] == [wanted] * 3
    data = topology.data.model_copy(update={"train": None, "function": "rows_as_chats:rows"})
    own = read_inputs(topology.model_copy(update={"data": data}))
    assert own.prompts.prompts[0].token_ids.tolist() == wanted


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.chat_template_kwargs={deeper: 1}", "deeper, which the student's chat template does not use; correct"),
        ("data.chat_template_kwargs.tools=[]", "tools, which every template gets from the run; remove it"),
        ("data.chat_template_kwargs=deep", 'found "deep"; write a mapping of names to values'),
    ],
)
def test_names_that_no_template_sees_are_refused(tmp_path: Path, override: str, words: str) -> None:
    chatty(tmp_path)
    with pytest.raises(InputError) as caught:
        examine(tmp_path / "topology.yaml", [override], lambda line: None)
    assert f"data.chat_template_kwargs: {words}" in str(caught.value)


def test_keys_with_dots(tmp_path: Path, folder: Path) -> None:
    row = {"in": {"text": "ab"}, "reward_model": {"ground_truth": 7}, "extra": json.dumps({"x": {"y": 1}}), "a.b": "c"}
    beside = {"in.text": "d", "in": {"text": "ab"}, "reward_model.ground_truth": "8", "extra.x": {"z": 2}}
    path = write_lines(tmp_path / "p.jsonl", row, beside, {"in": {"text": "e"}, "extra": {"x": None}})
    keys = {"prompt_key": "in.text", "label_key": "reward_model.ground_truth", "metadata_key": "extra.x"}
    found = [(one.token_ids.tolist(), one.label, one.metadata) for one in load(path, folder, **keys).prompts]
    assert found == [([1, 3, 4], "7", {"y": 1}), ([1, 6], "8", {"z": 2}), ([1, 7], "", {})]
    write_lines(path, {"a.b": "c"}, {"a.b": {"c": "ignored"}, "a": {"b": "d"}})
    assert "p.jsonl:2: the prompt is an object" in refused(path, folder, prompt_key="a.b")
    write_lines(path, {"a.b": {"c": "d"}}, {"a": {"b": {"c": "e"}}}, {"a": {"b.c": "f"}})
    assert [one.token_ids.tolist()[-1] for one in load(path, folder, prompt_key="a.b.c").prompts] == [6, 7, 8]
    missing = write_lines(tmp_path / "q.jsonl", {"in": {"words": "ab"}})
    assert "no key 'in.text'; the keys there are in; set prompt_key" in refused(missing, folder, prompt_key="in.text")


@pytest.mark.parametrize(
    ("value", "label"),
    [(3.0, "3"), (-0.0, "0"), (1.5, "1.5"), (7, "7"), (float("nan"), ""), ("3.0", "3.0"), (2**70, f"{2**70}")],
)
def test_labels_of_tables(tmp_path: Path, folder: Path, value: object, label: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a", "label": value})
    assert load(path, folder).prompts[0].label == label


def test_labels_of_decimal_columns(tmp_path: Path, folder: Path) -> None:
    path = write_table(
        tmp_path / "p.parquet", [{"prompt": "a", "label": Decimal("2.50")}, {"prompt": "a", "label": None}]
    )
    assert [prompt.label for prompt in load(path, folder).prompts] == ["2.50", ""]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": [USER | {"tool_calls": None}]}, [USER]),
        ({"prompt": np.array([USER | {"tool_calls": None}], dtype=object), "label": np.int64(7)}, [USER]),
        ({"prompt": (USER,), "label": np.float64(7.0), "metadata": {"x": np.array([1])}}, [USER]),
    ],
)
def test_rows_of_a_function_as_tables_give_them(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], messages: list[Any]
) -> None:
    prompts = own_prompts(tmp_path, folder, monkeypatch, [row])
    assert prompts[0].token_ids.tolist() == expected(folder, messages)
    assert prompts[0].label == ("7" if "label" in row else "")
    assert prompts[0].metadata == ({"x": [1]} if "metadata" in row else {})


def test_rows_of_a_function_that_are_of_no_use(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless: list[Any] = []
    endless.append(endless)
    rows = [{"prompt": endless}, {"prompt": "a", "metadata": {(1, 2): 3}}, {"prompt": "a", "label": np.array([1, 2])}]
    prompts = own_prompts(tmp_path, folder, monkeypatch, rows)
    for index, words in enumerate(("holds itself", "the metadata cannot be written as JSON", "the label is a list")):
        with pytest.raises(HookError, match=f"gave row {index}, which cannot be used: {words}"):
            prompts[index]


def own_prompts(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any]) -> OwnPrompts:
    (root / "rows_of_tables.py").write_text("given = []\ndef rows():\n    return given\n")
    monkeypatch.syspath_prepend(root)
    sys.modules.pop("rows_of_tables", None)
    import rows_of_tables  # type: ignore[import-not-found]

    rows_of_tables.given.extend(rows)
    return OwnPrompts("rows_of_tables:rows", Reading(SECTION, Tokenizer(folder)), 64)


def test_completions_written_as_messages(tmp_path: Path, folder: Path) -> None:
    """TRL's rows: a prompt and a completion, both lists of messages, in JSONL or in a table."""
    answer = [{"role": "assistant", "content": "cd"}]
    rows: list[Any] = [{"prompt": [USER], "completion": answer}, {"prompt": [SYSTEM, USER], "completion": answer}]
    path = write_lines(tmp_path / "c.jsonl", *rows, {"prompt": "a", "completion": "e"})
    as_text = write_lines(tmp_path / "t.jsonl", {"prompt": json.dumps([USER]), "completion": json.dumps(answer)})
    filled = [row | {"completion": [answer[0] | {"tool_calls": None}]} for row in rows]
    table = write_table(tmp_path / "c.parquet", filled)

    def responses(path: Path) -> list[list[int]]:
        section = CompletionsSection(path=path)
        found = load_completions(section, Tokenizer(folder), (20, 20), (2,), TeacherChoice())
        assert found.completions[0].prompt.token_ids.tolist() == expected(folder, [USER])
        return [one.response.tolist() for one in found.completions]

    assert responses(path) == [[5, 6, 2], [5, 6, 2], [7, 2]]
    assert responses(as_text) == [[5, 6, 2]] and responses(table) == [[5, 6, 2]] * 2
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    for completion in ([USER], [*answer, *answer], [calls]):
        write_lines(path, {"prompt": [USER], "completion": completion})
        with pytest.raises(InputError, match=r"c\.jsonl:1: the completion is not one message of the assistant"):
            responses(path)


def test_held_out_prompts_have_the_same_forms(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]
    rows = [{"chat": parts, "reward_model": {"ground_truth": 3.0}}, {"chat": json.dumps([USER]), "reward_model": None}]
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode()))
    keys = ["data.held_out.prompt_key=chat", "data.held_out.label_key=reward_model.ground_truth"]
    topology = small_topology(tmp_path, f"data.held_out.path={tmp_path}/*.gz", *keys)
    with pytest.raises(InputError, match=r"1 of 2 prompts have no label under 'reward_model.ground_truth'"):
        read_inputs(topology)
    rows[1]["reward_model"] = {"ground_truth": "4"}
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode()))
    found = read_inputs(topology).held_out["held_out"]
    assert [prompt.label for prompt in found.prompts] == ["3", "4"]
    wanted = Tokenizer(tmp_path / "student").encode_chat([USER])
    assert [prompt.token_ids.tolist() for prompt in found.prompts] == [wanted] * 2
