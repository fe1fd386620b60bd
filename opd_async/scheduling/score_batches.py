"""Token-budget batches of chunks to score: pure, with the clock as a parameter.

A batch leaves when it holds `batch_tokens` new tokens, or `max_wait_s` after its first chunk came. All waiting chunks
of a sample travel together, and a sample is in one batch at a time: each request extends the last one's prefix.

Responses that have ended go first, in the order in which they came; then tokens of the oldest weights, which are what a
step will wait for.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

from opd_async.transport.messages import Chunk

MAX_SAMPLES = 2048
"""Sequences of one batch (one a sample, two with a contrast), and `MAX_CONTEXT_TOKENS` all their tokens, prompts and
earlier responses included: an engine refuses larger requests, which would keep it busy with parsing."""
MAX_CONTEXT_TOKENS = 2 << 20


@dataclass(slots=True)
class ScoreItem:
    """Chunks of one sample, in order, that are scored by one request. There may be gaps between them: chunks that come
    back from a failed engine meet later ones."""

    sample_id: int
    arrived: float
    chunks: list[Chunk] = field(default_factory=list)
    new_tokens: int = 0
    """Tokens to score, as often as there are prompts behind which they are scored."""

    @property
    def reads(self) -> int:
        """How many prompts there are: so many sequences of a request."""
        return len(self.chunks[-1].read_prompts)

    @property
    def response_tokens(self) -> int:
        """Tokens of the response among `new_tokens`."""
        return self.new_tokens // self.reads

    @property
    def context(self) -> int:
        """Tokens of the sample up to its last chunk's end, behind each prompt: what a request carries."""
        return sum(prompt + self.chunks[-1].end for prompt in self.chunks[-1].read_prompts)

    def add(self, chunk: Chunk) -> None:
        """Put one chunk between the others by its position, and count its tokens."""
        insort(self.chunks, chunk, key=lambda one: (one.start, one.end))
        self.new_tokens += _to_score(chunk)


def _to_score(chunk: Chunk) -> int:
    return len(chunk.token_ids) * len(chunk.read_prompts)


class TokenBudgetBatcher:
    """Collects chunks and lets them go in batches, the most urgent first."""

    def __init__(self, batch_tokens: int, max_wait_s: float) -> None:
        self.batch_tokens = batch_tokens
        self.max_wait_s = max_wait_s
        self._waiting: OrderedDict[int, ScoreItem] = OrderedDict()
        self._in_flight: set[int] = set()
        self._free_tokens = 0
        self.waiting_tokens = 0
        """New tokens that have not left yet."""

    def add(self, chunk: Chunk, now: float) -> None:
        """Queue one chunk, in its place among those of its sample."""
        item = self._waiting.get(chunk.sample_id)
        if item is None:
            item = self._waiting[chunk.sample_id] = ScoreItem(chunk.sample_id, now)
        item.add(chunk)
        self.waiting_tokens += _to_score(chunk)
        if chunk.sample_id not in self._in_flight:
            self._free_tokens += _to_score(chunk)

    def due_at(self) -> float | None:
        """When the oldest sample that may leave must leave; None when none may."""
        for item in self._waiting.values():
            if item.sample_id not in self._in_flight:
                return item.arrived + self.max_wait_s
        return None

    def take(self, now: float) -> list[ScoreItem]:
        """The next batch, if one is full or overdue; empty otherwise. Its samples are in flight until `done`."""
        due = self.due_at()
        if due is None or (self._free_tokens < self.batch_tokens and now < due):
            return []
        batch: list[ScoreItem] = []
        tokens = context = sequences = 0
        free = [item for item in self._waiting.values() if item.sample_id not in self._in_flight]
        for item in sorted(free, key=_urgency):
            full = tokens + item.new_tokens > self.batch_tokens or context + item.context > MAX_CONTEXT_TOKENS
            if batch and (full or sequences + item.reads > MAX_SAMPLES):
                break
            batch.append(item)
            sequences += item.reads
            tokens += item.new_tokens
            context += item.context
            del self._waiting[item.sample_id]
        self._free_tokens -= tokens
        self.waiting_tokens -= tokens
        self._in_flight.update(item.sample_id for item in batch)
        return batch

    def done(self, sample_ids: Collection[int]) -> None:
        """These samples' batch has been scored (or given up): their next chunks may leave."""
        for sample_id in sample_ids:
            self._in_flight.discard(sample_id)
            if sample_id in self._waiting:
                self._free_tokens += self._waiting[sample_id].new_tokens

    def drop(self, sample_id: int) -> None:
        """Forget the chunks of one sample that wait here."""
        item = self._waiting.pop(sample_id, None)
        if item is None:
            return
        self.waiting_tokens -= item.new_tokens
        if sample_id not in self._in_flight:
            self._free_tokens -= item.new_tokens

    def take_all(self) -> list[Chunk]:
        """Everything that waits, whether or not it may leave: it goes elsewhere."""
        chunks = [chunk for item in self._waiting.values() for chunk in item.chunks]
        self._waiting.clear()
        self._free_tokens = self.waiting_tokens = 0
        return chunks


def _urgency(item: ScoreItem) -> tuple[bool, int]:
    is_running = item.chunks[-1].finish is None
    return is_running, item.chunks[0].weight_version if is_running else 0
