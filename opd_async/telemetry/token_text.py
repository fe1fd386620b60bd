"""Tell which part of a text each token has written, and write text so that a terminal shows all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

UNFINISHED = "�"
LONGEST_CHARACTER = 8
"""Tokens after which a character that is still unfinished is taken as it is."""


class Decoder(Protocol):
    """Of a tokenizer, what is needed here."""

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Return the text of token ids."""


class TokenText(NamedTuple):
    """A text and, for each of its tokens, how many characters it has with that token."""

    text: str
    ends: list[int]


def text_of_tokens(tokenizer: Decoder, ids: Sequence[int]) -> TokenText:
    """Decode token ids, special tokens included, with the end of each token in the text (characters).

    A character that several tokens make belongs to the last of them. Takes a time that is linear in the number of
    tokens: each is decoded together with a few before it, which may change how it is written.
    """
    text, ends = "", []
    before, done = 0, 0  # ids[before:done] are the context in which new tokens are decoded; the text ends at `done`
    for index in range(len(ids)):
        known = tokenizer.decode(list(ids[before:done]), skip_special=False)
        with_new = tokenizer.decode(list(ids[before : index + 1]), skip_special=False)
        last = index + 1 == len(ids)
        if with_new.endswith(UNFINISHED) and index - done < LONGEST_CHARACTER and not last:
            ends.append(len(text))
            continue
        text += with_new[len(known) :]
        ends.append(len(text))
        before, done = done, index + 1
    return TokenText(text, ends)


def shown(text: str) -> str:
    """Write each character that a terminal would not show, line ends included, as an escape."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
