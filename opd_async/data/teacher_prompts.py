"""What a teacher reads in place of the student's prompt: a prompt of its own in the row, or a template over the row.

    row + the student's text -> data.teacher_prompt (a key, or sandboxed Jinja) -> the teacher's text -> its own ids

The response's ids are the same for both: only what stands in front of them differs. That is how a solution, a hint, a
document, a system prompt or another chat template reaches a teacher, and the student never. `data.contrast_prompt` is a
further prompt of the same forms, behind which the same response is scored again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import UndefinedError
from numpy.typing import NDArray

from opd_async.config.inputs import DataSection
from opd_async.data.chat_template import TEMPLATE_ERRORS, Message, compile_template
from opd_async.data.messages import ChatOptions, read_chat
from opd_async.data.prompt_table import Columns
from opd_async.data.rows import RowError, lookup
from opd_async.data.tokenizer import Tokenizer
from opd_async.data.unicode import HALF_A_PAIR, is_text
from opd_async.errors import InputError

MARKS = ("{{", "{%")
"""What tells a template from the name of a key."""
APPENDED = "{{ text }}{{ privileged }}"
"""The prompt of a topology that names what is privileged and says no more: slime's form."""
MISSING = "the text that only the teacher is shown"


class TeacherPromptError(ValueError):
    """Says why no prompt for a teacher can be made of a row."""


class _MissingTextError(TeacherPromptError):
    """Says what the row lacks."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{MISSING} is missing: {what}; write it, or data.teacher_prompt_missing: plain")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentPrompt:
    """A row as the student's side has read it."""

    row: Mapping[str, Any]
    prompt: Any
    """Text, or chat messages."""
    messages: Sequence[Message]
    """The chat that it is; of a plain text one message of the user."""
    tools: Sequence[Any] | None
    text: str
    """What the student reads: the prompt, or what the chat template makes of the messages."""
    special: bool
    """Whether the tokenizer adds its special tokens to that text."""
    label: str
    metadata: Mapping[str, Any]
    teacher: str


@dataclass(frozen=True, slots=True)
class TeacherText:
    """What a teacher reads, and whether the tokenizer adds its special tokens."""

    text: str
    special: bool


@dataclass(slots=True)
class _Chat:
    """The student's chat template as a function of templates, which remembers whether it was called."""

    tokenizer: Tokenizer
    tools: Sequence[Any] | None
    """Those of the row, which the template is told of unless it is given others."""
    options: ChatOptions
    called: bool = field(default=False, init=False)

    def __call__(self, messages: Sequence[Message], **names: Any) -> str:
        """The text of a conversation; `names` are further variables of the template, `enable_thinking` say."""
        self.called = True
        tools = names.pop("tools", self.tools)
        return self.tokenizer.apply_chat_template(messages, tools, {**self.options.template_kwargs, **names})


class TeacherPrompts:
    """Makes the teacher's prompt of a row; the same object for all rows and all teachers."""

    def __init__(
        self,
        section: DataSection,
        tokenizer: Tokenizer,
        limits: Mapping[str, tuple[int, str]] | None = None,
        *,
        contrast: bool = False,
    ) -> None:
        """`limits` has, by teacher, the most tokens of a prompt and which key bounds it; `contrast`: those of
        `data.contrast_prompt`. Raises `InputError` for a template that does not parse."""
        self._tokenizer = tokenizer
        self._options = ChatOptions.of(section)
        self._name = "data.contrast_prompt" if contrast else "data.teacher_prompt"
        self._key = section.contrast_prompt if contrast else section.teacher_prompt
        self._privileged = section.privileged_key
        self._plain = section.teacher_prompt_missing == "plain"
        self.limits = dict(limits or {})
        source = APPENDED if self._key is None else self._key
        self._template = None
        if any(mark in source for mark in MARKS):
            self._template = compile_template(source, self._name, strict=True)
        self.words = (source, str(self._privileged), section.teacher_prompt_missing)
        """What decides which texts rows become."""

    @classmethod
    def of(
        cls, section: DataSection, tokenizer: Tokenizer, limits: Mapping[str, tuple[int, str]]
    ) -> TeacherPrompts | None:
        """None where teachers read what the student reads. Raises as the constructor."""
        own = section.teacher_prompt is not None or section.privileged_key is not None
        return cls(section, tokenizer, limits) if own else None

    @classmethod
    def of_contrast(
        cls, section: DataSection, tokenizer: Tokenizer, limits: Mapping[str, tuple[int, str]]
    ) -> TeacherPrompts | None:
        """Those that are read beside; None where nothing is. Raises as the constructor."""
        return None if section.contrast_prompt is None else cls(section, tokenizer, limits, contrast=True)

    def text(self, student: StudentPrompt) -> TeacherText | None:
        """What the teacher reads of a row; None if that is the student's prompt, because its own text is missing and
        such rows are trained plainly.

        Raises `TeacherPromptError` for such a row where they are refused, for a template that fails, and for a key
        whose value is no prompt.
        """
        try:
            found = self._rendered(student) if self._template is not None else self._of_key(student)
        except _MissingTextError:
            if self._plain:
                return None
            raise
        if not is_text(found.text):
            raise TeacherPromptError(f"the teacher's prompt {HALF_A_PAIR}")
        return found

    def _of_key(self, student: StudentPrompt) -> TeacherText:
        assert self._key is not None
        value = _lookup(self._key, student)
        if not isinstance(value, str | list):
            raise TeacherPromptError(f"{self._key!r} is neither text nor a list of chat messages with role and content")
        try:
            chat = read_chat(value, student.tools, self._options)
            if chat is None:
                return TeacherText(str(value), special=True)
            names = self._options.template_kwargs
            return TeacherText(self._tokenizer.apply_chat_template(chat.messages, chat.tools, names), special=False)
        except (RowError, InputError) as error:
            raise TeacherPromptError(f"{self._key!r}: {error}") from None

    def _rendered(self, student: StudentPrompt) -> TeacherText:
        assert self._template is not None
        chat = _Chat(self._tokenizer, student.tools, self._options)
        names = {
            "row": student.row,
            "prompt": student.prompt,
            "messages": [dict(message) for message in student.messages],
            "tools": student.tools,
            "text": student.text,
            "label": student.label,
            "metadata": student.metadata,
            "teacher": student.teacher,
            "chat": chat,
        }
        if self._privileged is not None:
            names["privileged"] = _lookup(self._privileged, student)
        try:
            text = self._template.render(**names)
        except UndefinedError as error:
            raise _MissingTextError(error.message or "") from None
        except (*TEMPLATE_ERRORS, InputError) as error:
            raise TeacherPromptError(f"{self._name} fails: {error}") from None
        if not text:
            raise _MissingTextError(f"{self._name} makes an empty text of the row")
        # a chat template writes the special tokens itself, called here or for the student's text
        written = chat.called or (not student.special and student.text in text)
        return TeacherText(text, special=not written)

    def looked_at(
        self, where: str, columns: Columns, tokens: NDArray[np.int64], names: Sequence[str], limit: int
    ) -> tuple[int, int]:
        """Of the usable prompts of a file (`limit` tokens at most): how many have none for their teacher, and the
        tokens of the longest that one has. `tokens` int64[n] has those of every row.

        Raises `InputError` where a prompt is too long for its teacher, one of `names`.
        """
        usable, whose = columns.lengths() <= limit, columns.teachers()
        for index, name in enumerate(names):
            mine = np.where(usable & (whose == index), tokens, 0)
            if problem := self.too_long(name, int(mine.max(initial=0))):
                count, row = int((mine > self.limits[name][0]).sum()), int(mine.argmax()) + 1
                raise InputError(f"{where}: {count} rows are too long for their teacher, row {row} most: {problem}")
        return int((tokens[usable] == 0).sum()), int(tokens[usable].max(initial=0))

    def too_long(self, teacher: str, tokens: int) -> str | None:
        """Why a prompt of so many tokens does not fit the teacher; None if it does."""
        limit, key = self.limits.get(teacher, (None, ""))
        if limit is None or tokens <= limit:
            return None
        return (
            f"the teacher's prompt has {tokens} tokens, and at most {limit} leave room for the response; raise {key}, "
            "or shorten what the teacher is shown"
        )


def _lookup(key: str, student: StudentPrompt) -> Any:
    """The value of a key of the row, or of its metadata; `TeacherPromptError` where it is absent or empty."""
    value = lookup(student.row, key)
    if value is None:
        value = lookup(student.metadata, key)
    if value is None or value != value or value in ("", []):  # pandas writes NaN for nothing
        raise _MissingTextError(f"no {key!r} in the row or its metadata")
    return value
