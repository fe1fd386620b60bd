"""One row of prompts, from a file or a function, to the text that is tokenized, its label and its metadata.

Row -> prompt, tools -> chat or plain text -> what is tokenized
    -> label, metadata, teacher            -> what travels beside it
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from opd_async.config.topology import PromptsSection
from opd_async.data.messages import NO_OPTIONS, Chat, ChatOptions, read_answer, read_chat
from opd_async.data.rows import Row, RowError, find, from_json, lookup, without_nulls
from opd_async.data.teacher_prompts import StudentPrompt, TeacherPromptError, TeacherPrompts, TeacherText
from opd_async.data.tokenizer import Tokenizer
from opd_async.data.unicode import HALF_A_PAIR, is_text
from opd_async.errors import InputError
from opd_async.transport.bounds import MAX_WORDS


@dataclass(frozen=True, slots=True)
class TeacherChoice:
    """Chooses who scores a prompt: the teacher that its metadata name under `key`, or the only teacher.

    Teachers have a row for ids below `rows`; None: for every id of the student's tokenizer.
    """

    names: tuple[str, ...] = ("",)
    key: str | None = None
    prompts: TeacherPrompts | None = None
    """Makes what a teacher reads; None: what the student reads."""
    contrast: TeacherPrompts | None = None
    """Makes what a teacher reads beside it; None: nothing."""
    rows: int | None = None

    def of(self, metadata: dict[str, Any]) -> str:
        """Return the teacher's name; `RowError` where the metadata name no teacher of the topology."""
        if self.key is None:
            return self.names[0]
        if metadata.get(self.key) in self.names:
            return str(metadata[self.key])
        there = f"{metadata[self.key]!r}" if self.key in metadata else "missing"
        raise RowError(f"the teacher, {self.key!r} of its metadata, is {there}; write {' or '.join(self.names)}")

    def check(self, what: str, ids: Sequence[int]) -> None:
        """Raise `RowError` if `what` holds an id for which a teacher has no row: engines do not survive one."""
        if self.rows is not None and max(ids, default=0) >= self.rows:
            raise RowError(
                f"{what} holds token id {max(ids)}, and a teacher's table has {self.rows} rows; leave the row out"
            )


ONE_TEACHER = TeacherChoice()


@dataclass(frozen=True, slots=True)
class Reading:
    """All that decides which prompt a row becomes."""

    section: PromptsSection
    tokenizer: Tokenizer
    teachers: TeacherChoice = ONE_TEACHER
    chats: ChatOptions = NO_OPTIONS
    answers: bool = False
    """The labels are responses, which may be written as a message."""

    def words(self) -> list[str]:
        """What the prompts of a file depend on beside its content, as words whose limits count."""
        section, chats, teachers = self.section, self.chats, self.teachers
        keys = [section.prompt_key, section.label_key, section.tools_key, section.metadata_key]
        options = [chats.as_chat, chats.system_prompt, chats.template_kwargs, self.answers]
        own = [() if one is None else one.words for one in (teachers.prompts, teachers.contrast)]
        keyed = json.dumps([keys, options, teachers.key, teachers.names, own], sort_keys=True)
        return [self.tokenizer.fingerprint, keyed, *([] if teachers.rows is None else [f"rows {teachers.rows}"])]


@dataclass(slots=True, kw_only=True)
class PromptText:
    """A row that can be used, before it is tokenized."""

    where: str
    label: str
    metadata: dict[str, Any]
    teacher: str
    text: str
    """What is tokenized."""
    add_special_tokens: bool
    teacher_text: TeacherText | None = None
    """What its teacher reads; None: the same."""
    contrast_text: TeacherText | None = None
    """What its teacher reads beside it; None: nothing."""


def read_text(row: Row, reading: Reading) -> PromptText:
    """Read one row. Raises `RowError` for one that cannot be used."""
    try:
        return _checked(row, reading)
    except RecursionError:
        raise RowError("is nested too deeply") from None


def _checked(row: Row, reading: Reading) -> PromptText:
    section, value = reading.section, row.value
    if isinstance(value, RowError):
        raise value
    if not isinstance(value, dict):
        raise RowError(f"holds {_kind(value)}, not an object; write {{{section.prompt_key!r}: ...}}")
    found = tuple(find(value, section.prompt_key))
    if not found:
        keys = ", ".join(str(key) for key in value) or "none"
        raise RowError(f"no key {section.prompt_key!r}; the keys there are {keys}; set prompt_key to one of them")
    label, metadata = lookup(value, section.label_key), _metadata(lookup(value, section.metadata_key))
    prompt, tools = found[0], lookup(value, section.tools_key)
    if row.table:
        prompt, tools = without_nulls(prompt), without_nulls(tools)
    chat = _chat(prompt, tools, reading)
    text = PromptText(
        where=row.where,
        label=_response(label) if reading.answers else _label(label),
        metadata=metadata,
        teacher=reading.teachers.of(metadata),
        text=_rendered(prompt, chat, reading),
        add_special_tokens=chat is None,
    )
    teachers = reading.teachers
    if teachers.prompts is not None:
        text.teacher_text = _read_by_teacher(row, prompt, chat, text, teachers.prompts)
    if teachers.contrast is not None:
        plain = TeacherText(text.text, text.add_special_tokens)
        text.contrast_text = _read_by_teacher(row, prompt, chat, text, teachers.contrast) or plain
    return text


def _read_by_teacher(
    row: Row, prompt: Any, chat: Chat | None, student: PromptText, prompts: TeacherPrompts
) -> TeacherText | None:
    """Return what the teacher of a row reads; None for the student's prompt. `RowError` where none can be made."""
    cells = row.value
    if row.table:
        cells = {key: without_nulls(cell) if isinstance(cell, list) else cell for key, cell in cells.items()}
    student_prompt = StudentPrompt(
        row=cells,
        prompt=prompt if chat is None else chat.messages if chat.of_text is None else chat.of_text,
        messages=[{"role": "user", "content": prompt}] if chat is None else chat.messages,
        tools=None if chat is None else chat.tools,
        text=student.text,
        special=student.add_special_tokens,
        label=student.label,
        metadata=student.metadata,
        teacher=student.teacher,
    )
    try:
        return prompts.text(student_prompt)
    except TeacherPromptError as error:
        raise RowError(str(error)) from None


def _label(value: Any) -> str:
    if isinstance(value, str):
        return _travels("the label", value)
    if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):  # pandas writes NaN for nothing
        return ""
    if isinstance(value, float) and value.is_integer():  # and 3.0 for 3 where a column has gaps
        return str(int(value))
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"the label is {_kind(value)}; write text or a number")


def _response(value: Any) -> str:
    """Return the text of a response that a data set gives."""
    answer = read_answer(value)
    return _travels("the response", answer) if isinstance(answer, str) else _label(answer)


def _metadata(value: Any) -> dict[str, Any]:
    value = from_json(value)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowError(f"the metadata is {_kind(value)}; write an object")
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError) as error:  # keys of a function's rows may be anything
        raise RowError(f"the metadata cannot be written as JSON: {error}") from None
    _travels("the metadata", text)
    return value


def _travels(what: str, text: str) -> str:
    """Return a text that goes to other processes as it is; `RowError` for one that is no text, or too long for that."""
    _is_text(what, text)
    if len(text) > MAX_WORDS:
        raise RowError(f"{what} has {len(text)} characters, and at most {MAX_WORDS} go to another process")
    return text


def _is_text(what: str, text: str) -> None:
    if not is_text(text):
        raise RowError(f"{what} {HALF_A_PAIR}")


def _chat(prompt: Any, tools: Any, reading: Reading) -> Chat | None:
    """Return the chat that a prompt is; None for a plain text. `RowError` for what is neither."""
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt):
        raise RowError(f"the prompt is {_kind(prompt)}; write text or a list of chat messages")
    return read_chat(prompt, tools, reading.chats)


def _rendered(prompt: Any, chat: Chat | None, reading: Reading) -> str:
    """Return the text to tokenize. Raises `RowError` for messages that the template refuses."""
    text = str(prompt)
    if chat is not None:
        try:
            text = reading.tokenizer.apply_chat_template(chat.messages, chat.tools, reading.chats.template_kwargs)
        except InputError as error:
            raise RowError(str(error)) from None
    _is_text("the prompt", text)  # only its tokens travel, which have a limit of their own
    return text


def _kind(value: Any) -> str:
    """Name the type of a value in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return {dict: "an object", str: "text", int: "a number", float: "a number"}.get(type(value), type(value).__name__)
