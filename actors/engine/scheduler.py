"""Who computes what in the next step: admission, token pool, prefix cache, retraction. Pure, no torch, no sockets.

    submit -> waiting -> (prefix match, admission) -> running -> plan() -> [Work] -> commit() -> ... -> release()
                ^                                        |
                +------------- retract ------------------+

Every running request needs one forward position per token whose KV is missing: many when it prefills, one when it
decodes. A step takes all of the decodes and up to `prefill_budget` prefill tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from opd_async.actors.engine.radix import RadixCache
from opd_async.actors.engine.request import Request
from opd_async.actors.engine.slots import IntArray, SlotPool

# Tokens of room that admission keeps for each request that is already decoding; retraction covers the rest.
DECODE_RESERVE = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in tokens, but `max_running`, which is in requests."""

    pool_tokens: int
    context_length: int
    max_running: int = 256
    prefill_budget: int = 2048


@dataclass(slots=True)
class Work:
    """Compute tokens [start, start + count) of `request` in this step; their slots are in its table row."""

    request: Request
    start: int
    count: int

    @property
    def completes(self) -> bool:
        """True when the step computes the last known token, so that the next one can be sampled."""
        return self.start + self.count == len(self.request.tokens)


class Scheduler:
    """Owns the slot table, int32 [max_running, context_length], and every request that is not finished."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = SlotPool(limits.pool_tokens)
        self.cache = RadixCache()
        self.table: IntArray = np.zeros((limits.max_running, limits.context_length), dtype=np.int32)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # by serial, oldest admission first
        self.retractions = 0
        self.hold_from: int | None = None
        self.on_admit: Callable[[Request], None] = lambda request: None
        self._rows = list(range(limits.max_running - 1, -1, -1))
        self._serial = 0

    @property
    def used_tokens(self) -> int:
        """Slots that running requests hold, prefix cache not counted."""
        return self.limits.pool_tokens - self.pool.free_count - self.cache.evictable_tokens

    @property
    def next_serial(self) -> int:
        """Serial of the next submitted request; `hold_from` set to it lets no later request in."""
        return self._serial

    def idle(self) -> bool:
        """True when nothing runs and nothing waits that may be admitted."""
        return not self.running and not any(self._admissible(request) for request in self.waiting)

    def submit(self, request: Request) -> None:
        """Queue a request, first come first served."""
        request.serial = self._serial
        self._serial += 1
        self.waiting.append(request)

    def plan(self) -> list[Work]:
        """Admit what fits, then choose this step's work and give it KV slots. Never exceeds the pool."""
        self._admit()
        works = self._choose()
        total = sum(work.count for work in works)
        # The oldest request alone always fits (requests are checked against the pool when they come), so this ends.
        while not self._make_room(total):
            # The youngest has the least KV to compute again, and the oldest must make progress.
            victim = next(reversed(self.running.values()))
            self.retract(victim)
            works = [work for work in works if work.request is not victim]
            total = sum(work.count for work in works)
        slots = self.pool.take(total)
        at = 0
        for work in works:
            row = work.request.table_row
            self.table[row, work.start : work.start + work.count] = slots[at : at + work.count]
            at += work.count
        return works

    def commit(self, works: list[Work]) -> None:
        """The step ran: its tokens have KV. A prompt that is now complete becomes shareable at once."""
        for work in works:
            request = work.request
            request.computed = work.start + work.count
            if not request.prompt_done and request.computed >= len(request.input_ids):
                request.prompt_done = True
                # Samples of one prompt that come later in the same wave reuse it without waiting for the first to end.
                if not request.prefill_only:
                    self._share(request)

    def release(self, request: Request) -> None:
        """Take a finished or aborted request out; its KV goes to the prefix cache."""
        if request.table_row < 0:
            self.waiting.remove(request)
            return
        self._share(request)
        self._drop(request)

    def retract(self, request: Request) -> None:
        """Drop a running request's own KV and put it back at the head of the queue."""
        # What came from the tree stays there; only the request's own part is dropped.
        row = self.table[request.table_row]
        self.pool.give_back(row[request.tree_tokens : request.computed])
        self._drop(request)
        request.restart()
        self.retractions += 1
        self.waiting.appendleft(request)

    def retract_all(self) -> int:
        """Retract everything, youngest first, so that the queue keeps its order. Returns how many."""
        victims = list(reversed(self.running.values()))
        for request in victims:
            self.retract(request)
        return len(victims)

    def flush(self) -> bool:
        """Empty the prefix cache; False, and nothing done, while a request holds KV."""
        if self.running:
            return False
        self.pool.give_back(self.cache.clear())
        return True

    def _admissible(self, request: Request) -> bool:
        return self.hold_from is None or request.serial < self.hold_from

    def _admit(self) -> None:
        if not self.waiting:
            return
        owed = sum(_outstanding(request) for request in self.running.values())
        # A prompt that was cut by the last step's budget goes on first.
        missing = (len(request.tokens) - request.computed for request in self.running.values())
        budget = self.limits.prefill_budget - sum(count for count in missing if count > 1)
        while self.waiting and budget > 0 and self._rows and self._admissible(self.waiting[0]):
            request = self.waiting[0]
            node, slots = self.cache.match(request.namespace, request.tokens, request.max_prefix)
            # Locked before counting, or its own prefix would count as room for it.
            self.cache.lock(node)
            request.computed = request.tree_tokens = len(slots)
            need = _outstanding(request)
            if self.running and owed + need > self.pool.free_count + self.cache.evictable_tokens:
                self.cache.unlock(node)
                request.computed = request.tree_tokens = 0
                return
            self.waiting.popleft()
            request.node = node
            request.table_row = self._rows.pop()
            self.table[request.table_row, : len(slots)] = slots
            # A retraction does not change what the client is told about its prompt.
            if request.cached_tokens is None:
                request.cached_tokens = len(slots)
            self.running[request.serial] = request
            self.on_admit(request)
            owed += need
            budget -= len(request.tokens) - request.computed

    def _choose(self) -> list[Work]:
        budget = self.limits.prefill_budget
        works = []
        for request in self.running.values():
            count = len(request.tokens) - request.computed
            # Decodes are never held back: one token each, and their clients wait for them.
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count:
                works.append(Work(request, request.computed, count))
        return works

    def _make_room(self, count: int) -> bool:
        short = count - self.pool.free_count
        if short > 0:
            self.pool.give_back(self.cache.evict(short))
        return self.pool.free_count >= count

    def _share(self, request: Request) -> None:
        """Move a running request's KV into the tree and hold it there; duplicates go back to the pool."""
        row = self.table[request.table_row]
        tokens = request.tokens[: request.computed]
        node, present = self.cache.insert(request.namespace, tokens, row[: request.computed])
        if present > request.tree_tokens:
            self.pool.give_back(row[request.tree_tokens : present])
            # The tree may have kept another request's slots for the same tokens; read those from now on.
            row[:present] = self.cache.match(request.namespace, tokens, present)[1]
        # In this order the shared part is never unlocked in between.
        self.cache.lock(node)
        if request.node is not None:
            self.cache.unlock(request.node)
        request.node, request.tree_tokens = node, request.computed

    def _drop(self, request: Request) -> None:
        if request.node is not None:
            self.cache.unlock(request.node)
        del self.running[request.serial]
        self._rows.append(request.table_row)
        request.table_row, request.node = -1, None


def _outstanding(request: Request) -> int:
    """Pool tokens that a request will ask for soon: missing prefill, and a little room to decode."""
    return len(request.tokens) - request.computed + min(request.remaining, DECODE_RESERVE)
