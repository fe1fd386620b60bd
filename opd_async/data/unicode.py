"""What is text, and what only looks like it: JSON can hold halves of surrogate pairs, which nothing can encode."""

from __future__ import annotations

HALF_A_PAIR = "holds half of a surrogate pair, which is not text"


def is_text(text: str) -> bool:
    """Whether `text` can be written as UTF-8: tokenized, sent, or put into a file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
