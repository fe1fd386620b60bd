"""Encode prompts, decode responses incrementally, and find stop strings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_async.actors.engine.loading import loading
from opd_async.actors.engine.request import Request

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_REPLACEMENT = "\ufffd"  # what a half-finished multi-byte character decodes to


@dataclass(slots=True)
class StreamCursor:
    """How far a request's text was sent: `sent` characters, decoded from `read` tokens, with context from `prefix`."""

    prefix: int = 0
    read: int = 0
    sent: int = 0


class TextCodec:
    """A tokenizer with the few calls that the engine needs."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a prompt."""
        return list(self._tokenizer.encode(text))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def matched_stop(self, request: Request) -> str | None:
        """The first of the request's stop strings that its response now contains."""
        # A token is at least one character in most vocabularies, so the string ends within this many tokens.
        window = max(len(stop) for stop in request.params.stop) + 1
        tail = self.decode(request.output_ids[-window:], request.params.skip_special_tokens)
        return next((stop for stop in request.params.stop if stop in tail), None)

    def text(self, request: Request) -> str:
        """The whole response, without the stop token or stop string that ended it (unless no_stop_trim)."""
        ids, stop = request.output_ids, None
        if request.finish_reason is not None and not request.params.no_stop_trim:
            stop = request.finish_reason.get("matched")
        if isinstance(stop, int):
            ids = ids[:-1]
        text = self.decode(ids, request.params.skip_special_tokens)
        if isinstance(stop, str) and stop in text:
            text = text[: text.index(stop)]
        return text

    def delta(self, request: Request, cursor: StreamCursor, upto: int, final: bool) -> str:
        """Return the text that the first `upto` response tokens add to the text already sent; advances `cursor`."""
        # With stop strings the text may shrink at the end, so it is decoded whole; without, only a short window is.
        if final or request.params.stop:
            text = self.text(request) if final else self.decode(request.output_ids[:upto])
            piece = text[cursor.sent :]
            cursor.sent += len(piece)
            return piece
        skip = request.params.skip_special_tokens
        before = self.decode(request.output_ids[cursor.prefix : cursor.read], skip)
        after = self.decode(request.output_ids[cursor.prefix : upto], skip)
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return ""
        cursor.prefix, cursor.read = cursor.read, upto
        cursor.sent += len(after) - len(before)
        return after[len(before) :]


def load_codec(path: Path) -> TextCodec | None:
    """The tokenizer in a model folder, or None when it holds none; `InputError` if transformers cannot load it."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer  # a second of imports that a folder without tokenizer is spared

    with loading(path, "tokenizer"):
        return TextCodec(AutoTokenizer.from_pretrained(path))
