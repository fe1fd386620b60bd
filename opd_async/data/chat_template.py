"""The chat template of a checkpoint folder: messages to text, in a sandbox, as transformers renders it.

    an override file, else chat_template.jinja, else tokenizer_config.json -> one template, or several by name
    messages, tools, names -> `tool_use` where there are tools and a template of this name, else `default` -> text

Templates see the names that transformers gives them and can neither change objects nor reach files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opd_async.data.unicode import HALF_A_PAIR, is_text
from opd_async.errors import InputError

Message = dict[str, Any]
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE_NAMES = frozenset({"messages", "tools", "add_generation_prompt", *SPECIAL_NAMES})
"""What every template gets from the run; nobody may give it another value."""
DEFAULT, WITH_TOOLS = "default", "tool_use"
# What a template can raise by itself: Jinja's own errors, and those of the expressions in it.
TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(RuntimeError, AssertionError, MemoryError),
)


class ChatTemplate:
    """The template of one folder. Raises `InputError` on construction if it does not parse."""

    def __init__(self, folder: Path, config: Mapping[str, Any], override: Path | None) -> None:
        """`config` is the folder's tokenizer_config.json."""
        self._source, self.texts = _find(folder, config, override)
        self._templates = {
            name: compile_template(text, f"chat template of {self._source}") for name, text in self.texts.items()
        }
        self._reads = {name: _names_read(text) for name, text in self.texts.items()}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        names: Mapping[str, Any],
        special: Mapping[str, str],
    ) -> str:
        """Return the text of a conversation, up to where the assistant is to speak.

        Raises `InputError` if there is no template, it does not use `tools` or one of `names`, or refuses the messages.
        """
        chosen = self._chosen(tools is not None)
        if chosen is None:
            raise InputError(f"{self._source} has no chat template; give one in data.chat_template")
        if tools is not None and "tools" not in self._reads[chosen]:
            raise InputError(
                f"tools, which the chat template of {self._source} does not use; set tools_key: null to leave them out"
            )
        # Always there, as in transformers: templates ask whether they are none.
        seen = {"documents": None, "add_generation_prompt": True, **special, **names}
        seen |= {"messages": list(messages), "tools": None if tools is None else list(tools)}
        try:
            text = self._templates[chosen].render(**seen)
        except TEMPLATE_ERRORS as error:
            raise InputError(f"the chat template of {self._source} refuses the messages: {error}") from None
        if not is_text(text):
            raise InputError(f"what the chat template of {self._source} makes of the messages {HALF_A_PAIR}")
        return text

    def unused(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that no template here looks at."""
        return [name for name in names if not any(name in reads for reads in self._reads.values())]

    def _chosen(self, tools: bool) -> str | None:
        wanted = [WITH_TOOLS, DEFAULT] if tools else [DEFAULT]
        return next((name for name in wanted if name in self._templates), None)


def _find(folder: Path, config: Mapping[str, Any], override: Path | None) -> tuple[str, dict[str, str]]:
    """Find the templates; returns their place, for messages, and their sources by name: none where there are none."""
    if override is not None:
        if not override.is_file():
            raise InputError(f"data.chat_template: no file {override}")
        return str(override), {DEFAULT: _read(override)}
    files = {DEFAULT: folder / "chat_template.jinja"}
    files[WITH_TOOLS] = folder / "additional_chat_templates" / f"{WITH_TOOLS}.jinja"
    found = {name: _read(file) for name, file in files.items() if file.is_file()}
    if found:
        return str(files[DEFAULT] if DEFAULT in found else folder), found
    template = config.get("chat_template")
    entries: list[Any] = [{"name": DEFAULT, "template": template}]
    if isinstance(template, list):  # several, by name
        entries = template
    named: dict[str, str] = {}
    for entry in entries:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if name in (DEFAULT, WITH_TOOLS) and isinstance(text, str):
            named[name] = text
    return str(folder), named


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{file}: cannot be read: {reason}") from None


def _environment(*, strict: bool = False) -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
        undefined=jinja2.StrictUndefined if strict else jinja2.Undefined,
        finalize=_written if strict else None,
    )


def _names_read(template: str) -> frozenset[str]:
    """Return every name that a template, which parses, reads."""
    names = _environment().parse(template).find_all(jinja2.nodes.Name)
    return frozenset(name.name for name in names if name.ctx == "load")


def compile_template(template: str, named: str, *, strict: bool = False) -> jinja2.Template:
    """Compile a template in the sandbox. `strict`: a name that is missing or none cannot be written.

    Raises `InputError`, which begins with `named`, for one that does not parse.
    """
    environment = _environment(strict=strict)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{named}, line {error.lineno}: {error.message}") from None
    # Jinja makes Python of it, which can be too deep or too large for Python.
    except (jinja2.TemplateError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise InputError(f"{named}: cannot be used: {error}") from None


def _written(value: object) -> object:
    if value is None:
        raise jinja2.UndefinedError("a value that is none")
    return value


class _Generation(jinja2.ext.Extension):
    """Renders the body of `{% generation %}...{% endgeneration %}`, with which templates mark the assistant's text."""

    tags = {"generation"}  # noqa: RUF012  (Jinja reads the class attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    """Return the present local time in this format, as templates ask for it."""
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a prompt must not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
