"""A teacher actor and its engine: the project's batcher in front of a prefill queue with a prefix cache.

    chunks -> CutPoints -> TokenBudgetBatcher -> `MAX_IN_FLIGHT` batches, one computed at a time -> scored chunks

The cache forgets the least recently used sample first, from its end on; a sample being scored cannot be forgotten.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from opd_async.bench.sim.clock import Clock
from opd_async.config.topology import TeacherSection
from opd_async.forecast.cost_model import PrefillCost
from opd_async.scheduling.cache_share import CacheShare, CutPoints
from opd_async.scheduling.score_batches import ScoreItem, TokenBudgetBatcher
from opd_async.transport.messages import Chunk

MAX_IN_FLIGHT = 2
MIN_CACHED_SHARE = TeacherSection().min_cached_share


class PrefixCache:
    """How many leading tokens of each sample an engine still holds; `capacity` tokens in all."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: OrderedDict[int, int] = OrderedDict()
        self._used = 0

    def touch(self, sample_id: int, prefix: int, total: int) -> int:
        """Compute a sample of `total` tokens of which `prefix` were scored before; returns how many were cached."""
        held = self._held.pop(sample_id, 0)
        self._held[sample_id] = total
        self._used += total - held
        while self._used > self._capacity and len(self._held) > 1:
            oldest, tokens = next(iter(self._held.items()))
            dropped = min(tokens, self._used - self._capacity)
            self._used -= dropped
            if dropped == tokens:
                del self._held[oldest]
            else:
                self._held[oldest] = tokens - dropped
        return min(held, prefix)


class TeacherEngine:
    """One teacher replica. `deliver` gets every scored chunk; `computed` and `new` count tokens."""

    def __init__(
        self,
        clock: Clock,
        batcher: TokenBudgetBatcher,
        points: CutPoints,
        cost: PrefillCost,
        cache: PrefixCache,
        deliver: Callable[[Chunk], None],
    ) -> None:
        self._clock = clock
        self._batcher = batcher
        self._points = points
        self._share = CacheShare(MIN_CACHED_SHARE)
        self._cost = cost
        self._cache = cache
        self._deliver = deliver
        self._batches: deque[list[ScoreItem]] = deque()
        self._computing = False
        self._timer: float | None = None
        self.computed = 0
        self.new = 0
        self.busy_s = 0.0

    def receive(self, chunks: Sequence[Chunk]) -> None:
        """Chunks of one sample arrive."""
        for chunk in chunks:
            self._queue(self._points.offer(chunk, self._share.coarse))
        self._dispatch()

    def advance(self, version: int) -> None:
        """The student engines hold weights `version`: what steps need soon may not wait."""
        self._queue(self._points.advance(version))
        self._dispatch()

    def _queue(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._batcher.add(chunk, self._clock.now)

    def _dispatch(self) -> None:
        while len(self._batches) + self._computing < MAX_IN_FLIGHT:
            batch = self._batcher.take(self._clock.now)
            if not batch:
                self._wait()
                return
            self._batches.append(batch)
            self._compute()

    def _wait(self) -> None:
        due = self._batcher.due_at()
        if due is not None and due != self._timer:
            self._timer = due
            self._clock.at(due, self._dispatch)

    def _compute(self) -> None:
        if self._computing or not self._batches:
            return
        self._computing = True
        batch = self._batches.popleft()
        seconds = self._cost.floor_s
        for item in batch:
            first, last = item.chunks[0], item.chunks[-1]
            prefix, total = first.prompt_tokens + first.start, last.prompt_tokens + last.end
            # what a first request computes of the prompt belongs to no response token that was scored before
            cached = self._cache.touch(item.sample_id, prefix, total)
            seconds += self._cost.tokens_s(cached, total)
            self.computed += total - cached
            self.new += total - (prefix if first.start else 0)
            self._share.observe(prefix if first.start else 0, cached)
        self.busy_s += seconds
        self._clock.after(seconds, lambda: self._finish(batch))

    def _finish(self, batch: list[ScoreItem]) -> None:
        self._computing = False
        self._compute()
        self._batcher.done([item.sample_id for item in batch])
        for item in batch:
            for chunk in item.chunks:
                self._deliver(chunk)
        self._dispatch()
