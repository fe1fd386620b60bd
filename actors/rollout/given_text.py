"""What an episode gives, as tokens: text as it is, messages in the form in which the chat template goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError

Message = Mapping[str, Any]
_ANSWER = "what-the-assistant-said"
"""Stands for a turn of the student while a template is asked for what follows one."""
LONG = 1 << 16
"""Characters from which on a text is tokenized in a thread."""


async def beside_others(characters: int, tokenize: Callable[[], NDArray[np.int32]]) -> NDArray[np.int32]:
    """int32[n] of so many `characters`, while everybody else of the actor goes on. On cancel: it ends by itself."""
    return await asyncio.to_thread(tokenize) if characters > LONG else tokenize()


def characters_of(messages: Sequence[Message]) -> int:
    """About how long the text of messages is."""
    return sum(len(str(message.get("content"))) for message in messages)


class GivenText:
    """Text and messages to ids, for one tokenizer and the names that its chat template sees."""

    def __init__(self, tokenizer: Tokenizer, names: Mapping[str, Any]) -> None:
        """`names` are those of the prompts, `data.chat_template_kwargs`."""
        self._tokenizer = tokenizer
        self._names = names

    def encode(self, given: str | Sequence[Message], last: int | None) -> NDArray[np.int32]:
        """int32[n] of what is given behind the token `last` (None: behind the prompt).

        Messages become what the chat template writes behind a turn of the assistant, up to where it is to speak again;
        the token that ends a turn is left out where `last` is it. Raises `InputError` if the template refuses them.
        """
        text = given if isinstance(given, str) else self._behind_a_turn(given, last)
        return np.array(self._tokenizer.encode_batch([text], add_special_tokens=False)[0], np.int32)

    def begin(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> NDArray[np.int32]:
        """int32[n] of a conversation from its beginning, up to where the student is to speak. Raises `InputError`."""
        text = self._tokenizer.apply_chat_template([dict(one) for one in messages], tools, self._names)
        ids = self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        if not ids:
            raise InputError("the chat template makes no token of the messages")
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special=False)

    def said(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens."""
        return self._tokenizer.decode(list(ids))

    def _behind_a_turn(self, messages: Sequence[Message], last: int | None) -> str:
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _ANSWER}]
        whole = self._tokenizer.apply_chat_template(
            [*before, *(dict(message) for message in messages)], names=self._names
        )
        behind = whole[whole.index(_ANSWER) + len(_ANSWER) :]
        return behind if last is None else behind.removeprefix(self.decode([last]))
