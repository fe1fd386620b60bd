"""Who scores a prompt: rendezvous hashing, so that a replica's loss moves only its own prompts."""

from __future__ import annotations

from collections.abc import Collection
from hashlib import blake2b


def rendezvous(key: int, replicas: Collection[int], salt: str = "") -> int:
    """The replica with the highest hash of (key, replica).

    All samples of a prompt, and all chunks of a sample, meet the same teacher prefix cache. Choices that follow one
    another (an actor, then one of its engines) need different salts, or the first would decide the second.
    """
    return max(replicas, key=lambda replica: (_weight(f"{salt}{key}/{replica}"), replica))


def _weight(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=8).digest()
