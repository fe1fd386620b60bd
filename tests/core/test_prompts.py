"""Prompts files: every broken row is named, long prompts are counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import make_model, write_lines

from opd_async.config.topology import PromptsSection
from opd_async.data.prompts import PromptSet, load_prompts
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError
from opd_async.transport.bounds import MAX_WORDS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(make_model(tmp_path_factory.mktemp("model")))


def load(path: Path, tokenizer: Tokenizer, limit: int = 64, **keys: str) -> PromptSet:
    return load_prompts(PromptsSection(path=path, **keys), tokenizer, limit)


def refused(path: Path, tokenizer: Tokenizer, limit: int = 64, **keys: str) -> str:
    with pytest.raises(InputError) as caught:
        load(path, tokenizer, limit, **keys)
    return str(caught.value)


def test_texts_chats_labels_and_metadata(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "ab"}]
    path = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": "abc", "label": "7", "metadata": {"x": [1]}, "other": 1},
        "",
        {"prompt": chat, "label": 7},
        {"prompt": "a", "label": 1.5, "metadata": None},
        {"prompt": "b" * 64},
        {"prompt": "é😀"},
    )
    loaded = load(path, tokenizer)
    assert loaded.skipped_too_long == 1
    assert [(prompt.prompt_id, prompt.label, prompt.metadata) for prompt in loaded.prompts] == [
        (0, "7", {"x": [1]}),
        (1, "7", {}),
        (2, "1.5", {}),
        (4, "", {}),
    ]
    assert loaded.prompts[0].token_ids.dtype == np.int32
    assert loaded.prompts[0].token_ids.tolist() == tokenizer.encode("abc") == [1, 3, 4, 5]
    assert loaded.prompts[1].token_ids.tolist() == tokenizer.encode_chat(chat)


def test_parquet_says_the_same_as_jsonl(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    rows: list[dict[str, Any]] = [
        {"question": chat, "answer": 3, "metadata": {"x": 1}},
        {"question": chat[:1], "answer": None, "metadata": {"x": 2}},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    lines = write_lines(tmp_path / "p.jsonl", *rows)
    keys = {"prompt_key": "question", "label_key": "answer"}
    ours, theirs = load(tmp_path / "p.parquet", tokenizer, **keys), load(lines, tokenizer, **keys)
    for left, right in zip(ours.prompts, theirs.prompts, strict=True):
        assert left.token_ids.tolist() == right.token_ids.tolist()
        assert (left.prompt_id, left.label, left.metadata) == (right.prompt_id, right.label, right.metadata)
    text = refused(tmp_path / "p.parquet", tokenizer)
    assert f"{tmp_path / 'p.parquet'}: row 0: no key 'prompt'; the keys there are question, answer, metadata" in text
    (tmp_path / "bad.parquet").write_text("PAR1 no")
    assert "not a parquet file" in refused(tmp_path / "bad.parquet", tokenizer)


BROKEN = {
    '{"prompt": "ab"': "not valid JSON: Expecting ',' delimiter at column 16",
    "[" * 100_000: "not valid JSON",
    "[1]": "holds a list, not an object",
    '"ab"': "holds text, not an object",
    '{"text": "ab", "label": "1"}': "no key 'prompt'; the keys there are text, label; set prompt_key to one of them",
    "{}": "no key 'prompt'; the keys there are none",
    '{"prompt": 3}': "the prompt is a number; write text or a list of chat messages",
    '{"prompt": null}': "the prompt is null",
    '{"prompt": []}': "the prompt is an empty list",
    '{"prompt": ["a"]}': "a chat message needs a role and a content, both text",
    '{"prompt": [{"role": "user"}]}': "a chat message needs a role and a content",
    '{"prompt": [{"role": "tool", "content": "a"}]}': "refuses the messages: no tools here",
    '{"prompt": "a", "label": true}': "the label is true; write text or a number",
    '{"prompt": "a", "label": ["1"]}': "the label is a list",
    '{"prompt": "a", "metadata": "x"}': "the metadata is text; write an object",
    '{"prompt": "\\ud800"}': "the prompt holds half of a surrogate pair",
    '{"prompt": "a", "label": "\\ud83d"}': "the label holds half of a surrogate pair",
    '{"prompt": "a", "metadata": {"a": ["\\udc00"]}}': "the metadata holds half of a surrogate pair",
    '{"prompt": "a", "metadata": {"\\ud83d": 1}}': "the metadata holds half of a surrogate pair",
    '{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}': "an answer and no prompt",
}


@pytest.mark.parametrize("line", sorted(BROKEN), ids=lambda line: line[:30])
def test_broken_lines(tmp_path: Path, tokenizer: Tokenizer, line: str) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a"}, "", line)
    text = refused(path, tokenizer)
    assert text.startswith(f"{path}: 1 broken row\n") and f"{path}:3: " in text and BROKEN[line] in text


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.sampled_from([*sorted(BROKEN), '{"prompt": "a"}']), min_size=1, max_size=25))
def test_all_broken_lines_are_counted(
    rows: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_lines(tmp_path_factory.mktemp("rows") / "p.jsonl", *rows)
    broken = [number for number, row in enumerate(rows, 1) if row in BROKEN]
    if not broken:
        assert len(load(path, tokenizer).prompts) == len(rows)
        return
    count, *lines = refused(path, tokenizer).splitlines()
    assert count == f"{path}: {len(broken)} broken row" + "s" * (len(broken) > 1)
    named = [line for line in lines if line.startswith(f"  {path}:")]
    assert named[0].startswith(f"  {path}:{broken[0]}: ") and len(named) <= 10
    repeated = [re.search(r"\(and (\d+) more rows\)$", line) for line in named]
    said = len(named) + sum(int(found[1]) for found in repeated if found)
    assert said == len(broken) if len(lines) == len(named) else said < len(broken)


def test_rows_with_the_same_fault_are_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "p.jsonl", '{"prompt": 3}', "[1]", '{"prompt": 4}', '{"prompt": 5}')
    assert refused(path, tokenizer).splitlines() == [
        f"{path}: 4 broken rows",
        f"  {path}:1: the prompt is a number; write text or a list of chat messages (and 2 more rows)",
        f"  {path}:2: holds a list, not an object; write {{'prompt': ...}}",
    ]


def test_files_without_usable_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "p.jsonl"
    assert f"no file {path}; write the path" in refused(path, tokenizer)
    write_lines(path, "", "  ")
    assert "holds no prompts; write one JSON object per line" in refused(path, tokenizer)
    write_lines(path, {"prompt": "abc"}, {"prompt": "abcdef"})
    assert "all 2 prompts are longer than 3 tokens (the shortest has 4)" in refused(path, tokenizer, limit=3)
    path.write_bytes(b'{"prompt": "\xff"}\n')
    assert f"{path}:1: not valid JSON" in refused(path, tokenizer)


def test_a_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(config | {"post_processor": None}))
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": ""})
    assert f"{path}:2: the prompt has no tokens" in refused(path, Tokenizer(folder))


def test_a_hundred_thousand_lines(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_lines(tmp_path / "p.jsonl", *({"prompt": "abc1", "label": str(n)} for n in range(100_000)))
    loaded = load(path, tokenizer)
    assert len(loaded.prompts) == 100_000 and loaded.prompts[-1].prompt_id == 99_999
    assert loaded.prompts[-1].label == "99999"


def test_labels_as_pandas_writes_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "a", "label": value} for value in (3.0, -2.0, 2.5, 1e3, float("nan"), None, 7)]
    path = write_lines(tmp_path / "p.jsonl", *rows)
    assert [prompt.label for prompt in load(path, tokenizer).prompts] == ["3", "-2", "2.5", "1000", "", "", "7"]


def test_what_is_too_long_for_a_message_is_said_of_its_row(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = "x" * (MAX_WORDS + 1)
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a", "label": long}, {"prompt": "b", "metadata": {"x": long}})
    text = refused(path, tokenizer)
    assert f":1: the label has {MAX_WORDS + 1} characters" in text and ":2: the metadata has" in text
