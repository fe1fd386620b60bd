"""Read prompts files and tokenize them.

    JSONL or parquet -> rows -> checked -> tokenized in batches -> columns, kept by content -> PromptSet

A prompt is a text, or a list of chat messages that goes through the chat template. Broken rows are reported together,
each with its file and line; prompts that are too long are counted and left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_async.config.topology import PromptsSection
from opd_async.data.prompt_cache import columns_of
from opd_async.data.prompt_table import ColumnWriter, Prompt, PromptTable
from opd_async.data.teacher_prompts import StudentPrompt, TeacherPromptError, TeacherPrompts, TeacherText
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError
from opd_async.extras import need
from opd_async.transport.bounds import MAX_WORDS

__all__ = ["Prompt", "PromptSet", "TeacherChoice", "load_prompts"]

_BATCH = 4096
"""Texts given to the tokenizer at once: enough for all cores, little memory."""
_SHOWN = 10
"""Kinds of broken rows named in an error; the rest are counted."""
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable prompts of a file in its order, and the number of prompts that were longer than allowed."""

    prompts: Sequence[Prompt]
    skipped_too_long: int
    read_plainly: int = 0
    """Prompts whose teacher has none of its own, though others' have."""
    longest_read: int | None = 0
    """Tokens of the longest prompt that only a teacher reads; None where nobody knows."""

    def lengths(self) -> npt.NDArray[np.int64] | None:
        """Return the tokens of each prompt, int64[n]; None where prompts are made as they are leased."""
        return self.prompts.lengths() if isinstance(self.prompts, PromptTable) else None

    def unlabelled(self) -> int:
        """Count the prompts that have no label."""
        if isinstance(self.prompts, PromptTable):
            return self.prompts.unlabelled()
        return sum(not prompt.label for prompt in self.prompts)


@dataclass(slots=True, kw_only=True)
class _Row:
    where: str
    prompt: Any
    label: Any
    metadata: Any
    teacher: str
    text: str = ""
    add_special_tokens: bool = True
    teacher_text: TeacherText | None = None


class RowError(ValueError):
    """Says why one row cannot be used; whoever reads it adds where the row is."""


@dataclass(frozen=True, slots=True)
class TeacherChoice:
    """Chooses who scores a prompt: the teacher that its metadata name under `key`, or the only teacher."""

    names: tuple[str, ...] = ("",)
    key: str | None = None
    prompts: TeacherPrompts | None = None
    """Makes what a teacher reads; None: what the student reads."""

    def of(self, metadata: dict[str, Any]) -> str:
        """Return the teacher's name; `RowError` where the metadata name no teacher of the topology."""
        if self.key is None:
            return self.names[0]
        if metadata.get(self.key) in self.names:
            return str(metadata[self.key])
        there = f"{metadata[self.key]!r}" if self.key in metadata else "missing"
        raise RowError(f"the teacher, {self.key!r} of its metadata, is {there}; write {' or '.join(self.names)}")


def load_prompts(
    section: PromptsSection, tokenizer: Tokenizer, max_prompt_tokens: int, teachers: TeacherChoice = TeacherChoice()
) -> PromptSet:
    """Read, check and tokenize a prompts file; prompts of more than `max_prompt_tokens` tokens are skipped.

    Blank lines of a JSONL file are not rows. Raises `InputError` for a missing, empty or broken file (with the line of
    each broken row, up to ten), and when no prompt is short enough.
    """
    path, limit = section.path, max_prompt_tokens
    keys = (section.prompt_key, section.label_key, section.metadata_key)
    words = [tokenizer.fingerprint, *map(str, keys), str(teachers.key), *teachers.names]
    words += teachers.prompts.words if teachers.prompts is not None else ()
    try:
        columns = columns_of(path, words, lambda writer: _fill(writer, section, tokenizer, teachers))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    prompts = PromptTable(columns, teachers.names, limit)
    if not prompts:
        raise InputError(
            f"{path}: all {len(columns)} prompts are longer than {limit} tokens (the shortest has "
            f"{int(columns.lengths().min())}); raise engines.student.context_tokens or lower "
            "rollout.sampling.max_response_tokens"
        )
    own = teachers.prompts
    read_plainly, longest = (0, 0) if own is None else own.looked_at(path, columns, teachers.names, limit)
    return PromptSet(prompts, len(columns) - len(prompts), read_plainly, longest)


def _fill(writer: ColumnWriter, section: PromptsSection, tokenizer: Tokenizer, teachers: TeacherChoice) -> None:
    """Read a file into columns, a few thousand rows at a time. `InputError` lists the rows that are broken."""
    broken: list[str] = []
    count = 0
    for batch in _batches(_rows(section, tokenizer, teachers, broken)):
        count += len(batch)
        if broken:  # no more than what is wrong is asked for now
            continue
        read = _teacher_ids(batch, tokenizer)
        for row, ids, others in zip(batch, _token_ids(batch, tokenizer), read, strict=True):
            if not ids:
                broken.append(f"{row.where}: the prompt has no tokens")
            writer.add(ids, row.label, row.metadata, teachers.names.index(row.teacher), others)
    if broken:
        raise InputError(_report(section.path, broken))
    if not count:
        raise InputError(f"{section.path}: holds no prompts; write one JSON object per line")


def _rows(section: PromptsSection, tokenizer: Tokenizer, teachers: TeacherChoice, broken: list[str]) -> Iterator[_Row]:
    """Read the rows that can be used; what is wrong with the others is added to `broken`."""
    for where, value in _read(section.path):
        try:
            row = _row(where, value, section, teachers)
            _prepare(row, tokenizer)
            _read_by_teacher(row, value, teachers)
        except RowError as error:
            broken.append(f"{where}: {error}")
        else:
            yield row


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _token_ids(rows: list[_Row], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokenize a batch: chats have their special tokens already, texts are given them."""
    return _encoded([(row.text, row.add_special_tokens) for row in rows], tokenizer)


def _teacher_ids(rows: list[_Row], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokenize what the teachers of a batch read; nothing for those that read the student's prompt."""
    ids: list[list[int]] = [[] for _ in rows]
    own = [(index, row.teacher_text) for index, row in enumerate(rows) if row.teacher_text is not None]
    found = _encoded([(one.text, one.special) for _, one in own], tokenizer)
    for (index, _), tokens in zip(own, found, strict=True):
        ids[index] = tokens
    return ids


def _encoded(texts: list[tuple[str, bool]], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokenize texts, each with the tokenizer's special tokens or without."""
    ids: list[list[int]] = [[] for _ in texts]
    for special in (True, False):
        chosen = [index for index, (_, wanted) in enumerate(texts) if wanted is special]
        batch = [texts[index][0] for index in chosen]
        for index, found in zip(chosen, tokenizer.encode_batch(batch, add_special_tokens=special), strict=True):
            ids[index] = found
    return ids


def _read_by_teacher(row: _Row, value: dict[str, Any], teachers: TeacherChoice) -> None:
    """Set `row.teacher_text`, where teachers have prompts of their own. Raises `RowError` where none can be made."""
    if teachers.prompts is None:
        return
    student = StudentPrompt(
        row=value,
        prompt=row.prompt,
        text=row.text,
        special=row.add_special_tokens,
        label=row.label,
        metadata=row.metadata,
        teacher=row.teacher,
    )
    try:
        row.teacher_text = teachers.prompts.text(student)
    except TeacherPromptError as error:
        raise RowError(str(error)) from None


def read_row(
    index: int, value: Any, section: PromptsSection, tokenizer: Tokenizer, limit: int, teachers: TeacherChoice
) -> Prompt:
    """Check and tokenize one row that no file holds. Raises `RowError` for one that is broken, empty or too long."""
    row = _row("", value, section, teachers)
    _prepare(row, tokenizer)
    _read_by_teacher(row, value, teachers)
    (ids,), (others,) = _token_ids([row], tokenizer), _teacher_ids([row], tokenizer)
    if not ids:
        raise RowError("the prompt has no tokens")
    if len(ids) > limit:
        raise RowError(f"the prompt has {len(ids)} tokens, and at most {limit} fit; leave it out")
    if teachers.prompts is not None and (problem := teachers.prompts.too_long(row.teacher, len(others))):
        raise RowError(problem)
    own = np.asarray(others, np.int32) if others else None
    return Prompt(index, np.asarray(ids, np.int32), row.label, row.metadata, row.teacher, teacher_ids=own)


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """Read each row as its position in words and its value. A line that is not JSON has a `RowError` as value."""
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path)
        else:
            yield from _read_jsonl(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                yield where, RowError(f"not valid JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                yield where, RowError(f"not valid JSON: {error}")


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    # Imported here: slow to import, and JSONL users do not need it.
    pyarrow = need("pyarrow", "parquet", f"{path}: a parquet file")
    parquet = need("pyarrow.parquet", "parquet", f"{path}: a parquet file")
    try:
        with parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(_BATCH):
                for value in batch.to_pylist():
                    yield f"{path}: row {row}", value
                    row += 1
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a parquet file: {error}") from None


def _row(where: str, value: Any, section: PromptsSection, teachers: TeacherChoice) -> _Row:
    if isinstance(value, RowError):
        raise value
    if not isinstance(value, dict):
        raise RowError(f"holds {_kind(value)}, not an object; write {{{section.prompt_key!r}: ...}}")
    if section.prompt_key not in value:
        keys = ", ".join(str(key) for key in value) or "none"
        raise RowError(f"no key {section.prompt_key!r}; the keys there are {keys}; set prompt_key to one of them")
    label, metadata = value.get(section.label_key), _metadata(value.get(section.metadata_key))
    return _Row(
        where=where,
        prompt=value[section.prompt_key],
        label=_label(label),
        metadata=metadata,
        teacher=teachers.of(metadata),
    )


def _label(value: Any) -> str:
    if value is None or value != value:  # pandas writes NaN for nothing
        return ""
    if isinstance(value, str):
        return _travels("the label", value)
    if isinstance(value, float) and value.is_integer():  # and 3.0 for 3 where a column has gaps
        return str(int(value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"the label is {_kind(value)}; write text or a number")


def _metadata(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowError(f"the metadata is {_kind(value)}; write an object")
    _travels("the metadata", json.dumps(value, default=str, ensure_ascii=False))
    return value


def _travels(what: str, text: str) -> str:
    """Return a text that goes to other processes as it is; `RowError` for one that is no text, or too long for that."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError(f"{what} holds half of a surrogate pair, which is not text") from None
    if len(text) > MAX_WORDS:
        raise RowError(f"{what} has {len(text)} characters, and at most {MAX_WORDS} go to another process")
    return text


def _prepare(row: _Row, tokenizer: Tokenizer) -> None:
    """Set `row.text`, the text to tokenize. Raises `RowError` for a prompt that is neither text nor chat messages."""
    if isinstance(row.prompt, str):
        row.text = row.prompt
    elif isinstance(row.prompt, list) and row.prompt:
        for message in row.prompt:
            if not (
                isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
            ):
                raise RowError("a chat message needs a role and a content, both text")
        if row.prompt[-1]["role"] == "assistant":
            raise RowError("the last message is the assistant's, an answer and no prompt; leave it out")
        try:
            row.text = tokenizer.apply_chat_template(row.prompt)
        except InputError as error:
            raise RowError(str(error)) from None
        row.add_special_tokens = False
    else:
        raise RowError(f"the prompt is {_kind(row.prompt)}; write text or a list of chat messages")
    try:
        row.text.encode()  # only its tokens travel, which have a limit of their own
    except UnicodeEncodeError:
        raise RowError("the prompt holds half of a surrogate pair, which is not text") from None


def _kind(value: Any) -> str:
    """Name the type of a value in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return {dict: "an object", str: "text", int: "a number", float: "a number"}.get(type(value), type(value).__name__)


def _report(path: Path, broken: list[str]) -> str:
    """Write one message about broken rows, given as `where: what`. Rows that differ only in numbers share a line."""
    same: dict[str, list[str]] = {}
    for problem in broken:
        same.setdefault(_DIGITS.sub("#", problem), []).append(problem)
    lines = [f"  {found[0]}" + (f" (and {len(found) - 1} more rows)" if found[1:] else "") for found in same.values()]
    rest = [f"  and {len(lines) - _SHOWN} other faults"] if len(lines) > _SHOWN else []
    count = f"{len(broken)} broken rows" if len(broken) > 1 else "1 broken row"
    return "\n".join([f"{path}: {count}", *lines[:_SHOWN], *rest])
