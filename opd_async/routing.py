"""Which teacher replica scores a prompt: rendezvous hashing, so that a replica's loss moves only its own prompts."""

from __future__ import annotations

from collections.abc import Collection
from hashlib import blake2b


def rendezvous(key: int, replicas: Collection[int]) -> int:
    """The replica with the highest hash of (key, replica).

    All samples of a prompt, and all chunks of a sample, meet the same teacher prefix cache.
    """
    return max(replicas, key=lambda replica: (_weight(key, replica), replica))


def _weight(key: int, replica: int) -> bytes:
    return blake2b(f"{key}/{replica}".encode(), digest_size=8).digest()
