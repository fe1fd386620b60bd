"""Read prompts files and tokenize them.

    files -> rows (rows.py) -> texts (prompt_rows.py) -> tokenized in batches -> columns, kept by content -> PromptSet

A prompt is a text, or a list of chat messages that goes through the chat template. Broken rows are reported together,
each with its file and line; prompts that are too long are counted and left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_async.config.topology import PromptsSection
from opd_async.data.messages import NO_OPTIONS, ChatOptions
from opd_async.data.prompt_cache import columns_of
from opd_async.data.prompt_rows import ONE_TEACHER, PromptText, Reading, TeacherChoice, read_text
from opd_async.data.prompt_table import ColumnWriter, Prompt, PromptTable
from opd_async.data.rows import Row, RowError, data_files, named, plain, read_rows
from opd_async.data.teacher_prompts import TeacherText
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError

__all__ = ["Prompt", "PromptSet", "Reading", "TeacherChoice", "load_prompts", "read_row"]

_BATCH = 4096
"""Texts given to the tokenizer at once: enough for all cores, little memory."""
_SHOWN = 10
"""Kinds of broken rows named in an error; the rest are counted."""
_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The usable prompts of a section's files, in order, and the number of prompts that were longer than allowed."""

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


def load_prompts(
    section: PromptsSection,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    teachers: TeacherChoice = ONE_TEACHER,
    chats: ChatOptions = NO_OPTIONS,
    *,
    answers: bool = False,
) -> PromptSet:
    """Read, check and tokenize prompts files; prompts of more than `max_prompt_tokens` tokens are skipped.

    `answers`: the labels are responses, which may be written as a message. Raises `InputError` for a missing, empty or
    broken file (with the line of each broken row, up to ten), and when no prompt is short enough.
    """
    reading, where = Reading(section, tokenizer, teachers, chats, answers), named(section.path)
    try:
        columns = columns_of(data_files(section.path), reading.words(), lambda writer: _fill(writer, reading))
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror or error}") from None
    prompts = PromptTable(columns, teachers.names, max_prompt_tokens)
    if not prompts:
        raise InputError(
            f"{where}: all {len(columns)} prompts are longer than {max_prompt_tokens} tokens (the shortest has "
            f"{int(columns.lengths().min())}); raise engines.student.context_tokens or lower "
            "rollout.sampling.max_response_tokens"
        )
    names, limit = teachers.names, max_prompt_tokens
    plainly = longest = 0
    if (own := teachers.prompts) is not None:
        plainly, longest = own.looked_at(where, columns, columns.teacher_lengths(), names, limit)
    if (other := teachers.contrast) is not None:
        longest = max(longest, other.looked_at(where, columns, columns.contrast_lengths(), names, limit)[1])
    return PromptSet(prompts, len(columns) - len(prompts), plainly, longest)


def read_row(index: int, value: Any, reading: Reading, limit: int) -> Prompt:
    """Check and tokenize one row that no file holds. Raises `RowError` for one that is broken, empty or too long.

    It may be a row of a table: keys with null count as missing.
    """
    try:
        row = read_text(Row("", plain(value), True), reading)
    except RecursionError:  # only a function's rows can hold themselves
        raise RowError("holds itself, or is nested too deeply") from None
    (ids,) = _token_ids([row], reading.tokenizer)
    (own,), (other,) = _teacher_ids([row], reading.tokenizer)
    _check_ids(ids, own, other, reading.teachers)
    if len(ids) > limit:
        raise RowError(f"the prompt has {len(ids)} tokens, and at most {limit} fit; leave it out")
    for prompts, read in ((reading.teachers.prompts, own), (reading.teachers.contrast, other)):
        if prompts is not None and (problem := prompts.too_long(row.teacher, len(read))):
            raise RowError(problem)
    teacher, contrast = (np.asarray(read, np.int32) if read else None for read in (own, other))
    return Prompt(
        index,
        np.asarray(ids, np.int32),
        row.label,
        row.metadata,
        row.teacher,
        teacher_ids=teacher,
        contrast_ids=contrast,
    )


def _check_ids(ids: Sequence[int], own: Sequence[int], other: Sequence[int], teachers: TeacherChoice) -> None:
    """Raise `RowError` for a prompt of no tokens, and for ids of it or of the teacher's that no teacher can read."""
    if not ids:
        raise RowError("the prompt has no tokens")
    if teachers.contrast is not None and not other:
        raise RowError("what the teacher reads beside its prompt has no tokens")
    teachers.check("the prompt", ids)
    teachers.check("the teacher's prompt", [*own, *other])


def _fill(writer: ColumnWriter, reading: Reading) -> None:
    """Read files into columns, a few thousand rows at a time. `InputError` lists the rows that are broken."""
    broken: list[str] = []
    count, where = 0, named(reading.section.path)
    for batch in _batches(_rows(reading, broken)):
        count += len(batch)
        if broken:  # no more than what is wrong is asked for now
            continue
        read = _teacher_ids(batch, reading.tokenizer)
        for row, ids, own, other in zip(batch, _token_ids(batch, reading.tokenizer), *read, strict=True):
            try:
                _check_ids(ids, own, other, reading.teachers)
            except RowError as error:
                broken.append(f"{row.where}: {error}")
            writer.add(ids, row.label, row.metadata, reading.teachers.names.index(row.teacher), own, other)
    if broken:
        raise InputError(_report(where, broken))
    if not count:
        raise InputError(f"{where}: holds no prompts; write one JSON object per line")


def _rows(reading: Reading, broken: list[str]) -> Iterator[PromptText]:
    """Read the rows that can be used; what is wrong with the others is added to `broken`."""
    for found in read_rows(reading.section.path):
        try:
            row = read_text(found, reading)
        except RowError as error:
            broken.append(f"{found.where}: {error}")
        else:
            yield row


def _batches(rows: Iterator[PromptText]) -> Iterator[list[PromptText]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _token_ids(rows: list[PromptText], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokenize a batch: chats have their special tokens already, texts are given them."""
    return _encoded([(row.text, row.add_special_tokens) for row in rows], tokenizer)


def _teacher_ids(rows: list[PromptText], tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenize what the teachers of a batch read, and what they read beside it.

    Nothing for those that read the student's prompt, and those that read nothing beside.
    """
    texts = [row.teacher_text for row in rows], [row.contrast_text for row in rows]
    own, other = (_encoded_those(column, tokenizer) for column in texts)
    return own, other


def _encoded_those(texts: Sequence[TeacherText | None], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokenize the texts that are there."""
    ids: list[list[int]] = [[] for _ in texts]
    there = [(index, one) for index, one in enumerate(texts) if one is not None]
    found = _encoded([(one.text, one.special) for _, one in there], tokenizer)
    for (index, _), tokens in zip(there, found, strict=True):
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


def _report(path: str, broken: list[str]) -> str:
    """Write one message about broken rows, given as `where: what`. Rows that differ only in numbers share a line."""
    same: dict[str, list[str]] = {}
    for problem in broken:
        same.setdefault(_DIGITS.sub("#", problem), []).append(problem)
    lines = [f"  {found[0]}" + (f" (and {len(found) - 1} more rows)" if found[1:] else "") for found in same.values()]
    rest = [f"  and {len(lines) - _SHOWN} other faults"] if len(lines) > _SHOWN else []
    count = f"{len(broken)} broken rows" if len(broken) > 1 else "1 broken row"
    return "\n".join([f"{path}: {count}", *lines[:_SHOWN], *rest])
