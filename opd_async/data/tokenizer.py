"""The tokenizer of a Hugging Face checkpoint folder, without transformers.

text     -> tokenizer.json, post-processor's special tokens included      -> ids
messages -> chat template (`chat_template.py`) -> text -> the same, without them -> ids
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from opd_async.data.chat_template import SPECIAL_NAMES, ChatTemplate, Message, strftime_now
from opd_async.data.json_object import read_object
from opd_async.errors import InputError


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
        self.template = ChatTemplate(folder, config, chat_template)
        """How conversations become text."""

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

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        names: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, up to where the assistant is to speak.

        `tools` and further `names` are seen by the template as transformers would pass them. Raises `InputError` if the
        folder has no chat template, or the template does not use the tools or refuses the messages.
        """
        return self.template.render(messages, tools, names or {}, self._special)

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
        templates = json.dumps(self.template.texts, sort_keys=True)
        parts = [*versions, self._tokenizer.to_str(), templates, json.dumps(self._special, sort_keys=True)]
        if "strftime_now" in templates:  # another prompt every day
            parts.append(strftime_now("%Y-%m-%d %H"))
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def tokens(self) -> dict[int, str]:
        """Return the token of each id, added tokens included; the first by name where several have one id."""
        return {token_id: token for token, token_id in sorted(self._vocab.items(), reverse=True)}

    @cached_property
    def _vocab(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))


def _read_config(file: Path) -> dict[str, Any]:
    """Read a JSON file beside the tokenizer; empty if there is none."""
    return read_object(file) if file.is_file() else {}


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the named special tokens as templates see them; older files write each as an object with `content`.

    `special_tokens_map.json` is older than `added_tokens_decoder` in the config: where that is, the map says nothing.
    """
    if "added_tokens_decoder" not in config:
        config = config | _read_config(folder / "special_tokens_map.json")
    tokens: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens
