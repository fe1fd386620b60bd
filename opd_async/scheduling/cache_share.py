"""Coarser scoring when a teacher engine's prefix cache does not hold: pure, without a clock.

Each scoring request carries a whole prefix. While the cache holds it, only new tokens are computed and every chunk may
leave at once. When it does not, each request computes the prefix again, whatever was scored before; then the tokens of
a response wait for its end, or for the step that needs them. They are computed once, and the prefix once more for each
step that cuts the response.

    chunk -> CutPoints.offer(chunk, CacheShare.coarse) -> chunks that may leave -> batcher -> engine
                                       ^ observe(prefix, cached) of each answer <---------------+

One sample in `PROBE_EVERY` is a probe: it leaves at cut points that double (`first`, 2 * `first`, 4 * `first`, ...), so
that somebody finds out when the cache holds again. A probe of L tokens computes less than 2 L of them again.

Tokens never wait beyond the staleness bound: step b + S cannot start without the scores of what weights b have made
(docs/staleness.md). They leave when the engines hold weights b + S - 1, so that the step need not wait for the teacher;
with S = 1 that would be at once, so they leave when they are due. With S = 0 nothing ever waits.
"""

from __future__ import annotations

from opd_async.transport.messages import Chunk

PROBE_EVERY = 16
"""Of so many samples one shows whether the cache holds: few enough to cost little, enough to be there at any time."""
HOLDS_AGAIN = 0.95
"""Share of the prefixes that an engine must find before all chunks leave at once again. Higher than `min_share` on
purpose: while most samples wait, the others have the cache almost to themselves, and their share is too optimistic."""
_BELIEF = 8192.0
"""Prefix tokens that a cache is believed to have held before the first answer: a cold start is no verdict."""
_DECAY = 0.9
"""Weight that an answer keeps with each later one."""


class CacheShare:
    """How much of the prefixes that one engine has seen before it still finds in its cache."""

    def __init__(self, min_share: float) -> None:
        """Coarse below `min_share`, until the share is `HOLDS_AGAIN`; 0 never."""
        self.min_share = min_share
        self.coarse = False
        """Whether chunks for this engine should wait."""
        self._prefix = self._cached = _BELIEF

    @property
    def share(self) -> float:
        """Share of the prefix tokens of the last answers that came from the cache."""
        return self._cached / self._prefix

    def observe(self, prefix_tokens: int, cached_tokens: int) -> None:
        """An answer: its requests had `prefix_tokens` that were scored before, of which `cached_tokens` were cached."""
        if prefix_tokens == 0:
            return
        self._prefix = _DECAY * self._prefix + prefix_tokens
        self._cached = _DECAY * self._cached + min(cached_tokens, prefix_tokens)
        limit = HOLDS_AGAIN if self.coarse else self.min_share
        self.coarse = self.share < limit


def next_cut(position: int, first: int) -> int:
    """The smallest of `first`, 2 * `first`, 4 * `first`, ... above `position`."""
    cut = first
    while cut <= position:
        cut *= 2
    return cut


class CutPoints:
    """Chunks that wait for the end of their response, by sample and in order."""

    def __init__(self, first: int, max_staleness: int | None) -> None:
        """`first` is the first cut point of a probe. `max_staleness` None: steps take whole responses only, so no token
        is due before its response has ended."""
        self.first = first
        self._patience = None if max_staleness is None else min(max_staleness, max(max_staleness - 1, 1))
        self._version = -1
        self._held: dict[int, list[Chunk]] = {}

    @property
    def held_tokens(self) -> int:
        """Tokens that wait here."""
        return sum(_end(held) - held[0].start for held in self._held.values())

    def offer(self, chunk: Chunk, coarse: bool) -> list[Chunk]:
        """The chunks of this sample that may leave now: all of them, or none yet."""
        held = self._held.setdefault(chunk.sample_id, [])
        held.append(chunk)
        probed = chunk.sample_id % PROBE_EVERY == 0 and _end(held) >= next_cut(held[0].start, self.first)
        if coarse and not probed and chunk.finish is None and not self._due(held):
            return []
        return self._held.pop(chunk.sample_id)

    def advance(self, version: int) -> list[Chunk]:
        """Every engine holds weights `version`: the chunks whose scores a step needs soon."""
        self._version = version
        due = [sample_id for sample_id, held in self._held.items() if self._due(held)]
        return [chunk for sample_id in due for chunk in self._held.pop(sample_id)]

    def drop(self, sample_id: int) -> None:
        """Forget what waits of one sample."""
        self._held.pop(sample_id, None)

    def _due(self, held: list[Chunk]) -> bool:
        if self._patience is None:
            return False
        newest = max(self._version, held[-1].weight_version)
        return held[0].weight_version + self._patience <= newest


def _end(held: list[Chunk]) -> int:
    return held[-1].end
