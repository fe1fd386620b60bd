"""Coarser scoring when a teacher engine's prefix cache does not hold: pure, without a clock.

Each scoring request carries a whole prefix. While the cache holds it, only new tokens are computed and every chunk may
leave at once. When it does not, each request computes the prefix again, whatever was scored before; then the tokens of
a response wait for its end, or for the step that needs them. They are computed once, and the prefix once more for each
step that cuts the response.

    chunk -> CutPoints.offer(chunk, CacheShare.coarse) -> chunks that may leave -> batcher -> engine
                                       ^ observe(prefix, cached) of each answer <---------------+

One sample in `SENTINEL_EVERY` is a sentinel: it leaves at cut points that double (`first`, 2 * `first`, 4 * `first`,
...), so that its answers show when the cache holds again. A sentinel of L tokens computes less than 2 L of them again.

Tokens never wait beyond the staleness bound: step b + S cannot start without the scores of what weights b have made
(docs/staleness.md). They leave when the engines hold weights b + S - 1, so that the step need not wait for the teacher;
with S = 1 that would be at once, so they leave when they are due. With S = 0 nothing ever waits.
"""

from __future__ import annotations

from opd_async.transport.messages import Chunk

SENTINEL_EVERY = 16
"""One sample of so many shows whether the cache holds: few enough to cost little, enough to be there at any time."""
HOLDS_AGAIN = 0.95
"""Share of the prefixes that an engine must find before all chunks leave at once again. Higher than `min_share` on
purpose: while most samples wait, the others have the cache almost to themselves, and their share is too optimistic."""
_BELIEF = 8192.0
"""Prefix tokens that a cache is believed to have held before the first answer: a cold start proves nothing."""
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
        """Record an answer: of `prefix_tokens` that its requests had scored before, `cached_tokens` were cached."""
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
        """`first` is the first cut point of a sentinel. `max_staleness` None: steps take whole responses only, so that
        no token is due before its response has ended."""
        self.first = first
        # steps that tokens may wait: S = 0 -> 0, 1 -> 1, 2 -> 1, 3 -> 2, ...; None: until the response has ended
        self._patience = None if max_staleness is None else min(max_staleness, max(max_staleness - 1, 1))
        self._version = -1
        self._waiting: dict[int, list[Chunk]] = {}

    @property
    def waiting_tokens(self) -> int:
        """New tokens that wait here."""
        return sum(_end(waiting) - waiting[0].start for waiting in self._waiting.values())

    def offer(self, chunk: Chunk, coarse: bool) -> list[Chunk]:
        """Take a chunk in; returns the chunks of its sample that may leave now: all of them, or none yet."""
        waiting = self._waiting.setdefault(chunk.sample_id, [])
        waiting.append(chunk)
        is_sentinel = chunk.sample_id % SENTINEL_EVERY == 0
        at_cut = is_sentinel and _end(waiting) >= next_cut(waiting[0].start, self.first)
        if coarse and not at_cut and chunk.finish is None and not self._due(waiting):
            return []
        return self._waiting.pop(chunk.sample_id)

    def advance(self, version: int) -> list[Chunk]:
        """Learn that every engine holds weights `version`; returns the chunks whose scores a step needs soon."""
        self._version = version
        due = [sample_id for sample_id, waiting in self._waiting.items() if self._due(waiting)]
        return [chunk for sample_id in due for chunk in self._waiting.pop(sample_id)]

    def drop(self, sample_id: int) -> None:
        """Forget the chunks of one sample that wait here."""
        self._waiting.pop(sample_id, None)

    def _due(self, waiting: list[Chunk]) -> bool:
        if self._patience is None:
            return False
        newest = max(self._version, waiting[-1].weight_version)
        return waiting[0].weight_version + self._patience <= newest


def _end(waiting: list[Chunk]) -> int:
    return waiting[-1].end
