"""The tokenizer of a Hugging Face checkpoint folder, without transformers.

    text     -> tokenizer.json, post-processor's special tokens included      -> ids
    messages -> chat template (sandboxed Jinja) -> text -> the same, without them -> ids

The chat template is an override file, else `chat_template.jinja`, else the one in `tokenizer_config.json`: the order
of transformers. Templates see the names that transformers gives them and can neither change objects nor reach files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opd_async.data.json_object import read_object
from opd_async.errors import InputError

Message = dict[str, Any]
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a template can raise by itself: Jinja's own errors, and those of the expressions in it.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class Tokenizer:
    """Text to token ids and back, for one checkpoint folder.

    Raises `InputError` on construction if `tokenizer.json` is missing or broken, or a template does not parse.
    """

    def __init__(self, folder: Path, chat_template: Path | None = None) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{folder} has no tokenizer.json; give a complete checkpoint folder")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        # The Rust library raises bare Exception for whatever it cannot parse.
        except Exception as error:
            raise InputError(f"{file}: not a tokenizer: {error}") from None
        # A file may carry the padding and truncation of its last training run; prompts want neither.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        config = _read_config(folder / "tokenizer_config.json")
        self._special = _special_tokens(folder, config)
        self._template_source, template = _find_template(folder, config, chat_template)
        self._template = (
            compile_template(template, f"chat template of {self._template_source}") if template is not None else None
        )
        self._template_text = template or ""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with the special tokens that the post-processor adds."""
        return list(self._tokenizer.encode(text).ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Return the token ids of each text, on all cores; no special tokens for text out of a chat template."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of token ids; `skip_special` leaves special tokens out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def apply_chat_template(self, messages: Sequence[Message], **more: Any) -> str:
        """Return the text of a conversation, up to where the assistant is to speak; `more` are names that the template
        sees beside its own.

        Raises `InputError` if the folder has no chat template, or the template refuses the messages.
        """
        if self._template is None:
            raise InputError(f"{self._template_source} has no chat template; give one in data.chat_template")
        # Always there, as in transformers: templates ask whether they are none.
        names = {"tools": None, "documents": None, "add_generation_prompt": True, **self._special, **more}
        try:
            return self._template.render(**{**names, "messages": list(messages)})
        except TEMPLATE_ERRORS as error:
            raise InputError(f"the chat template of {self._template_source} refuses the messages: {error}") from None

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation. The template writes the special tokens itself; none are added."""
        return self.encode_batch([self.apply_chat_template(messages)], add_special_tokens=False)[0]

    @property
    def end_id(self) -> int | None:
        """Return the id of the token that ends a text; None if the folder names none."""
        return self._vocab.get(self._special.get("eos_token", ""))

    @property
    def vocab_size(self) -> int:
        """Return the highest token id plus one; a model's table may be padded beyond it."""
        return max(self._vocab.values(), default=-1) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Return a hex digest of everything that decides which ids a text or a conversation becomes."""
        versions = [tokenizers.__version__, jinja2.__version__]
        parts = [*versions, self._tokenizer.to_str(), self._template_text, json.dumps(self._special, sort_keys=True)]
        if "strftime_now" in self._template_text:  # another prompt every day
            parts.append(_strftime_now("%Y-%m-%d %H"))
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @cached_property
    def vocab_hash(self) -> str:
        """Return a hex digest (BLAKE2b, 16 bytes) of the whole map from token to id, added tokens included."""
        text = json.dumps(sorted(self._vocab.items()), ensure_ascii=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def _vocab(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))


def _read_config(file: Path) -> dict[str, Any]:
    """A JSON file beside the tokenizer, empty if there is none."""
    return read_object(file) if file.is_file() else {}


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens as templates see them; older files write each as an object with `content`.

    `special_tokens_map.json` is older than `added_tokens_decoder` in the config: where that is, the map says nothing.
    """
    if "added_tokens_decoder" not in config:
        config = config | _read_config(folder / "special_tokens_map.json")
    tokens: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _find_template(folder: Path, config: dict[str, Any], override: Path | None) -> tuple[str, str | None]:
    """Find the template; returns its place, for messages, and its source, which is None where there is no template."""
    for file in [override] if override else [folder / "chat_template.jinja"]:
        if file.is_file():
            return str(file), file.read_text(encoding="utf-8")
        if file is override:
            raise InputError(f"data.chat_template: no file {file}")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return str(folder), template if isinstance(template, str) else None


def compile_template(template: str, named: str, *, strict: bool = False) -> jinja2.Template:
    """Compile a template in the sandbox. `strict`: a name that is missing or none cannot be written.

    Raises `InputError`, which begins with `named`, for one that does not parse.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
        undefined=jinja2.StrictUndefined if strict else jinja2.Undefined,
        finalize=_written if strict else None,
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"{named}, line {error.lineno}: {error.message}") from None


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


def _strftime_now(pattern: str) -> str:
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
