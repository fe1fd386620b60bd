"""Prompts as columns, kept by content: found again, made anew when anything has changed, small in memory."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import make_model, write_lines

from opd_async.config.topology import PromptsSection
from opd_async.data import prompt_cache, prompts
from opd_async.data.prompt_cache import cache_folder
from opd_async.data.prompt_table import HEADER, Columns, ColumnWriter, PromptTable
from opd_async.data.prompts import PromptSet, TeacherChoice, load_prompts
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError

ONE = TeacherChoice()
WORDS = st.text(st.characters(exclude_categories=()), max_size=6)
ROW = st.tuples(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5),
    WORDS,
    st.dictionaries(WORDS.filter(lambda text: text.isascii()), st.integers() | st.none(), max_size=2),
    st.integers(0, 2),
)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where prompts are kept in this test, however small their file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prompt_cache, "SMALL_BYTES", 0)
    return cache_folder()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def rows_of(found: PromptSet) -> list[tuple[Any, ...]]:
    return [(p.prompt_id, p.token_ids.tolist(), p.label, p.metadata, p.teacher) for p in found.prompts]


class Counted(Tokenizer):
    """Counts the texts that it is given."""

    texts = 0

    def encode_batch(self, texts: Any, add_special_tokens: bool = True) -> list[list[int]]:
        self.texts += len(texts)
        return super().encode_batch(texts, add_special_tokens)


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, max_size=6), st.booleans(), st.integers(1, 5))
def test_every_prompt_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], in_files: bool, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("columns") if in_files else None
    writer = ColumnWriter(folder)
    for ids, label, metadata, teacher in rows:
        writer.add(ids, label, metadata, teacher)
    columns = writer.finish()
    table = PromptTable(columns, ("a", "b", "c"), limit)
    expected = [
        (number, ids, label, metadata, "abc"[teacher])
        for number, (ids, label, metadata, teacher) in enumerate(rows)
        if len(ids) <= limit
    ]
    assert rows_of(PromptSet(table, 0)) == expected and len(table) == len(expected)
    assert table.unlabelled() == sum(not label for _, _, label, *_ in expected)
    assert [prompt.prompt_id for prompt in table[1:3]] == [number for number, *_ in expected[1:3]]
    if expected:
        assert table[-1].prompt_id == expected[-1][0] and table[0].token_ids.dtype == np.int32
    with pytest.raises(IndexError):
        table[len(expected)]


def test_what_has_not_changed_is_not_tokenized_again(tmp_path: Path, kept: Path, model: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", *({"prompt": "abc"[: 1 + n % 3], "label": str(n)} for n in range(50)))
    section, first, second = PromptsSection(path=path), Counted(model), Counted(model)
    found = load_prompts(section, first, 3)
    assert first.texts == 50 and len(list(kept.iterdir())) == 1 and found.skipped_too_long == 16
    moved = path.rename(tmp_path / "elsewhere.jsonl")
    again = load_prompts(PromptsSection(path=moved), second, 3)
    assert second.texts == 0 and rows_of(again) == rows_of(found)
    assert load_prompts(PromptsSection(path=moved), second, 9).skipped_too_long == 0 and second.texts == 0
    assert oct(kept.stat().st_mode)[-3:] == "700"


def test_whatever_decides_the_tokens_makes_them_anew(tmp_path: Path, kept: Path, model: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "abc", "other": "ab", "metadata": {"t": "y"}, "label": "1"})
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    tokenizer, words = Tokenizer(model), ["abc"]

    def ids(section: PromptsSection, tokenizer: Tokenizer, teachers: TeacherChoice = ONE) -> list[Any]:
        return rows_of(load_prompts(section, tokenizer, 64, teachers))

    usual = ids(PromptsSection(path=path), tokenizer)
    assert ids(PromptsSection(path=path, prompt_key="other"), tokenizer) != usual
    assert ids(PromptsSection(path=path, label_key="other"), tokenizer) != usual
    choice = TeacherChoice(("x", "y"), "t")
    assert ids(PromptsSection(path=path), tokenizer, choice)[0][-1] == "y"
    assert ids(PromptsSection(path=path), Tokenizer(model, template)) == usual, "the same tokens, another key"
    assert len(list(kept.iterdir())) == 5
    path.write_text(path.read_text().replace(words[0], "cba"))
    assert ids(PromptsSection(path=path), tokenizer) != usual and len(list(kept.iterdir())) == 6


def test_what_is_damaged_or_half_there_is_made_again(tmp_path: Path, kept: Path, model: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", *({"prompt": "abc"} for _ in range(9)))
    usual = rows_of(load_prompts(PromptsSection(path=path), Tokenizer(model), 64))
    (folder,) = kept.iterdir()
    for harm in (
        lambda: os.truncate(folder / "ids", 5),
        lambda: (folder / "text").unlink(),
        lambda: (folder / HEADER).write_text("{"),
        lambda: (folder / HEADER).unlink(),
    ):
        harm()
        again = Counted(model)
        assert rows_of(load_prompts(PromptsSection(path=path), again, 64)) == usual and again.texts == 9
        assert [found.name for found in kept.iterdir()] == [folder.name], "no other folder is left"


def test_a_broken_file_is_not_kept(tmp_path: Path, kept: Path, model: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "abc"}, {"prompt": 7})
    with pytest.raises(InputError, match=r"p.jsonl:2: the prompt is a number"):
        load_prompts(PromptsSection(path=path), Tokenizer(model), 64)
    assert list(kept.iterdir()) == []


def test_without_room_prompts_are_in_memory(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prompt_cache, "SMALL_BYTES", 0)
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "abc", "label": "7"})
    (row,) = rows_of(load_prompts(PromptsSection(path=path), Tokenizer(model), 64))
    assert row == (0, Tokenizer(model).encode("abc"), "7", {}, "")


def test_old_files_make_room(tmp_path: Path, kept: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "MOST_FILES", 3)
    for number in range(5):
        path = write_lines(tmp_path / "p.jsonl", {"prompt": "abc", "label": str(number)})
        load_prompts(PromptsSection(path=path), Tokenizer(model), 64)
    assert len(list(kept.iterdir())) == 3


def test_a_prompt_takes_less_than_300_bytes(tmp_path: Path, kept: Path, model: Path) -> None:
    count = 10_000
    rows = ({"prompt": "abcdefghij" * 3, "label": str(n), "metadata": {"row": n}} for n in range(count))
    path = write_lines(tmp_path / "p.jsonl", *rows)
    load_prompts(PromptsSection(path=path), Tokenizer(model), 31)
    tracemalloc.start()
    try:
        found = load_prompts(PromptsSection(path=path), Tokenizer(model), 31)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.prompts) == count and found.prompts[count - 1].metadata == {"row": count - 1}
    mapped = sum(file.stat().st_size for file in next(iter(kept.iterdir())).iterdir())
    assert (held + mapped) / count < 300 and peak / count < 300, (held, mapped, peak)


def test_columns_that_are_not_there_are_refused(tmp_path: Path) -> None:
    (tmp_path / HEADER).write_text(json.dumps({"ids": 0}))
    with pytest.raises((OSError, KeyError)):
        Columns.mapped(tmp_path)
    assert prompts.Prompt(0, np.zeros(1, np.int32), "", {}).metadata_json == "{}"
