"""Proof that a sample was leased: a number that only the run can make, given with a lease and shown with each chunk.

The receiver of a chunk needs no list of leases, and no order of messages: what it is shown is enough.
"""

from __future__ import annotations

import hashlib
import hmac

from opd_async.keys import RunKeys

_BYTES = 8


class Grants:
    """Makes and checks grants with a key of the run; without keys every grant is 0 and holds."""

    def __init__(self, keys: RunKeys | None) -> None:
        self._key = None if keys is None else keys.secret("leases")

    def of(self, sample_id: int, attempt: int, actor: int) -> int:
        """The grant of a lease: int in [0, 2**62)."""
        if self._key is None:
            return 0
        text = f"{sample_id} {attempt} {actor}".encode()
        digest = hashlib.blake2b(text, key=self._key, digest_size=_BYTES).digest()
        return int.from_bytes(digest, "little") >> 2

    def holds(self, grant: int, sample_id: int, attempt: int, actor: int) -> bool:
        """Whether this is the grant of that lease."""
        expected = self.of(sample_id, attempt, actor)
        return self._key is None or hmac.compare_digest(
            grant.to_bytes(_BYTES, "little"), expected.to_bytes(_BYTES, "little")
        )
