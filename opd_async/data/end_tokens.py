"""Which tokens end a response: one answer for plan, actors, engines and given completions.

config.json, generation_config.json (ids), tokenizer (the token that it names as its end) -> all of them
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from opd_async.data.json_object import read_object
from opd_async.data.tokenizer import Tokenizer
from opd_async.errors import InputError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def end_ids(folder: Path) -> tuple[int, ...]:
    """Return every id that ends a response of the model in `folder`, ascending; empty if the folder names none.

    A tokenizer that cannot be read names none: its own check says why. Raises `InputError` for a broken config.
    """
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            ids |= _token_ids(read_object(folder / name).get("eos_token_id"))
    own = _tokenizer_end(folder, tuple(_stamp(folder / name) for name in _TOKENIZER_FILES))
    return tuple(sorted(ids if own is None else {*ids, own}))


def _token_ids(value: object) -> set[int]:
    """Return the ids in an `eos_token_id`, which may be absent, one id or a list."""
    values = value if isinstance(value, list) else [value]
    return {item for item in values if isinstance(item, int) and not isinstance(item, bool)}


def _stamp(file: Path) -> tuple[int, int]:
    """Changes when the file does."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=16)
def _tokenizer_end(folder: Path, stamps: tuple[tuple[int, int], ...]) -> int | None:
    """Kept until a file changes, since a large vocabulary takes a second to read."""
    try:
        return Tokenizer(folder).end_id
    except InputError:
        return None
