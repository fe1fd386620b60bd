"""One teacher engine of a teacher actor: what waits for it, what it is scoring, and whether it can be trusted.

    chunks -> batcher -> (breaker closed, a free slot) -> engine /generate (max_new_tokens 0) -> owner.deliver
                 |                                           |
                 +------ the breaker opens ------------------+--> owner.reroute: another engine, or here again later

    loop         waits for                                            unblocked by
    dispatch     a full or overdue batch, a free slot, the breaker    a chunk, time, a finished batch, a canary
    batch (few)  the engine; the intake's queue                       the engine; the intake
    watch        the time of the next canary; an open breaker         time; failures in a row

On cancel of a batch: its chunks go back to the owner.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import chain, islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.client.engine_client import EngineClient
from opd_async.actors.client.guard import Guard
from opd_async.actors.client.replies import Scores
from opd_async.actors.teacher.canary import Canary, CanaryError
from opd_async.actors.teacher.live_weights import LiveWeights
from opd_async.errors import EngineError, EngineFault
from opd_async.role import Role
from opd_async.scheduling.breaker import Failures, backoff_s
from opd_async.scheduling.cache_share import CacheShare
from opd_async.scheduling.pace import Answers
from opd_async.scheduling.score_batches import ScoreItem, TokenBudgetBatcher
from opd_async.scheduling.unproven import Scored, Unproven
from opd_async.transport.messages import Chunk

log = logging.getLogger(__name__)

Request = tuple[NDArray[np.int32], int]
"""int32[N] token ids, and the index of the first one to score."""

PAUSE_S = 10.0
"""For so long weights wait for what is being scored; then it is given up, and asked again after them."""
ABORTS = 40
"""So often in a row a request may be ended by a student's engine that is being stopped, again and again until it
stands: longer than that takes."""
FAILED_CANARIES = 3
"""So many failed checks of one engine in a row end the run."""


class Owner(Protocol):
    """What a lane needs of its teacher actor."""

    def requests(self, item: ScoreItem) -> list[Request]:
        """All ids so far, and where the new ones begin, behind each prompt that the teacher reads; none for a sample
        that is not scored any more."""

    def salt(self, item: ScoreItem, live: LiveWeights, mixed: int) -> str:
        """Whose keys and values the request of an item may use now, of an engine as `LiveWeights.salt` says."""

    def scored_before(self, item: ScoreItem) -> list[int]:
        """Tokens in front of the item that an engine was sent when it scored what is before it, behind each prompt."""

    async def deliver(self, item: ScoreItem, scores: Sequence[Scores]) -> None:
        """Send the item's chunks on, with the scores of each request; none: they have no tokens. On cancel: the rest is
        rerouted."""

    def reroute(self, chunks: Sequence[Chunk]) -> None:
        """Take back chunks that could not be scored here."""

    def count_failure(self, items: Sequence[ScoreItem], fault: EngineFault) -> list[Failures]:
        """Count one more failed try of each sample; returns what went wrong with each since its last score."""

    def is_last_usable(self, lane: Lane) -> bool:
        """Whether no other engine can take over this one's work."""

    def busy_changed(self) -> None:
        """A batch has begun or ended."""

    def engine_recovered(self) -> None:
        """An engine can score again: others may give it their work."""

    async def suspect(self, url: str, text: str, scored: Sequence[Scored]) -> None:
        """Say what an engine has scored that is not to be trusted. On cancel: it may or may not have been sent."""

    async def give_up(self, text: str) -> None:
        """End the run with this reason. On cancel: it may or may not have been sent."""


class Lane:
    """One engine's queue, slots, breaker, canary and cache."""

    def __init__(
        self, role: Role, client: EngineClient, owner: Owner, answers: Answers, live: LiveWeights | None = None
    ) -> None:
        """`live`: the engine is one of the student's, whose weights change."""
        self._role = role
        self._live = live
        self._settings = role.plan.topology.teacher
        # an engine that is being restarted is out for longer than its start takes
        self._outage_s = 2 * role.plan.topology.supervisor.start_deadline_s
        self._metrics = role.metrics
        self._clock = role.clock
        self._owner = owner
        self.client = client
        self.guard = Guard(client.url, role.metrics["opd_teacher_breaker_open"].labels(client.url), role.clock)
        self.canary = Canary(client, role.plan.vocab_size, live)
        self._unproven = Unproven(self._settings.canary_every_tokens)
        self._canary_due, self._proven = asyncio.Event(), asyncio.Event()
        if live is not None:  # the first is sent as soon as it holds weights of the run
            self._canary_due.set()
        self._mixed = 0
        """How often it has scored with other weights than the run's."""
        self.cache = CacheShare(self._settings.min_cached_share)
        self.batcher = self._new_batcher()
        self.slow = False
        """The engine is far slower than its peers: others get its work."""
        self._answers = answers
        self._batches: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(self._settings.max_in_flight)
        self._changed = asyncio.Event()
        self._failed_checks = 0

    def _new_batcher(self) -> TokenBudgetBatcher:
        return TokenBudgetBatcher(self._settings.batch_tokens, self._settings.max_wait_ms / 1000)

    @property
    def busy(self) -> bool:
        """Whether the engine is scoring."""
        return bool(self._batches)

    def add(self, chunk: Chunk) -> None:
        """Queue a chunk for this engine; it leaves with the next batch."""
        self.batcher.add(chunk, self._clock.now())
        self._changed.set()

    async def reset(self) -> None:
        """Forget every sample; batches under way are cancelled. On cancel: some of them may still run."""
        await self._cancel_batches()
        self.batcher = self._new_batcher()

    async def hand_over(self) -> None:
        """Give everything back that waits here or is being scored; the owner sends it elsewhere.

        On cancel: some batches may still run.
        """
        self._owner.reroute(self.batcher.take_all())
        await self._cancel_batches()

    def holds_weights(self) -> None:
        """The engine, one of the student's, holds weights of the run: what it failed to do before, it may do now."""
        if not self.guard.closed:
            self.guard.reset()
            self._canary_due.set()

    async def pause(self) -> None:
        """Return once nothing is being scored: the weights are about to change, and no new batch leaves.

        On cancel: some batches may still run.
        """
        if self._batches:
            await asyncio.wait(list(self._batches), timeout=PAUSE_S)
        await self._cancel_batches()

    async def _cancel_batches(self) -> None:
        batches = list(self._batches)
        for task in batches:
            task.cancel()
        if batches:
            await asyncio.wait(batches, timeout=10.0)

    # --- scoring -----------------------------------------------------------------------------------------------------

    async def dispatch(self) -> None:
        """Send batches as they fill or fall due, a bounded number at once.

        On cancel: batches under way run on; the role cancels them too.
        """
        while True:
            await self._slots.acquire()
            batch = await self._next_batch()
            # no await between taking a batch and reading its tokens: a reset may forget them at any other time
            requests = [self._owner.requests(item) for item in batch]
            tokens = sum(item.new_tokens for item in batch)
            self._unproven.begins(tokens)
            task = self._role.spawn(self._batch(batch, requests), "batch")
            self._batches.add(task)
            self._owner.busy_changed()
            task.add_done_callback(partial(self._ended, tokens))

    async def _next_batch(self) -> list[ScoreItem]:
        while True:
            await self.guard.until_closed()
            if self._live is not None:
                await self._live.until_held()
            if not self._unproven.room(self._settings.batch_tokens):
                self._proven.clear()
                self._canary_due.set()
                await self._proven.wait()
                continue
            now = self._clock.now()
            if batch := self.batcher.take(now):
                return batch
            due = self.batcher.due_at()
            # nothing is awaited between looking at the batcher and here, so that no chunk can come in between and be
            # missed: `add` sets the event again for every later one
            self._changed.clear()
            try:
                async with self._clock.timeout(None if due is None else max(due - now, 0.0)):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _ended(self, tokens: int, task: asyncio.Task[None]) -> None:
        self._batches.discard(task)
        self._unproven.ends(tokens)
        self._proven.set()
        self._slots.release()
        self._changed.set()
        self._owner.busy_changed()

    async def _batch(self, batch: Sequence[ScoreItem], requests: Sequence[list[Request]]) -> None:
        left = deque((item, asked) for item, asked in zip(batch, requests, strict=True) if asked)
        try:
            wanted = [(item, asked) for item, asked in left if item.new_tokens]
            scores = await self._score(wanted) if wanted else []
            if scores is None:
                return
            self._count(wanted, scores)
            for item, _ in wanted:
                self._unproven.scored(Scored(item.sample_id, item.chunks[0].start, item.chunks[-1].end))
            if self._unproven.due:
                self._canary_due.set()
            by_sample = {item.sample_id: score for (item, _), score in zip(wanted, scores, strict=True)}
            while left:
                await self._owner.deliver(left[0][0], by_sample.get(left[0][0].sample_id, ()))
                left.popleft()
        finally:
            self.batcher.done([item.sample_id for item in batch])
            self._owner.reroute([chunk for item, _ in left for chunk in item.chunks])

    async def _score(self, wanted: Sequence[tuple[ScoreItem, list[Request]]]) -> list[list[Scores]] | None:
        """Score one batch, trying again after failures; None once the breaker is open: another engine may do it.

        The scores of all requests of each item.
        """
        failures, new_tokens = 0, sum(item.new_tokens for item, _ in wanted)
        while not failures or self.guard.closed:
            if self._live is not None and not self._live.may_score:
                return None
            asked, began = object(), self._clock.now()
            self._answers.asked(asked, began)
            try:
                found = await self._ask(wanted)
                self._answers.answered(asked, self._clock.now(), new_tokens)
            except EngineError as error:
                failures += 1
                await self._failed([item for item, _ in wanted], error, failures)
                if self.guard.closed:
                    await self._clock.sleep(backoff_s(failures, self._clock.random))
            else:
                self.guard.succeeded()
                return found
            finally:
                self._answers.ended(asked)
                sizes = {"tokens": new_tokens, "samples": len(wanted)}
                self._role.trace.span(f"score {self.client.url}", "score", self._clock.now() - began, **sizes)
        return None

    async def _ask(self, wanted: Sequence[tuple[ScoreItem, list[Request]]]) -> list[list[Scores]]:
        """One request, and its answer dealt to the items. Raises `EngineError`."""
        requests = [one for _, requests in wanted for one in requests]
        if self._live is None:
            scores = await self.client.score(requests)
        else:
            salts = ((self._owner.salt(item, self._live, self._mixed), those) for item, those in wanted)
            scores = await self.client.score(requests, [salt for salt, those in salts for _ in those])
            try:
                self._live.check(scores)
            except EngineError:
                self._mixed += 1  # what it has cached meanwhile is not used again
                raise
        left = iter(scores)
        return [list(islice(left, len(those))) for _, those in wanted]

    async def _failed(self, items: Sequence[ScoreItem], error: EngineError, times: int) -> None:
        self._role.count("teacher_retries")
        self._metrics["opd_teacher_retries_total"].labels(error.fault.value).inc()
        if error.fault is EngineFault.ABORTED and self._live is not None and times <= ABORTS:
            return  # the engine stops for new weights, and ends what it was asked
        log.warning("scoring failed: %s", error)
        if error.fault is EngineFault.SILENT:  # five deadlines in a row would be too long a wait; a canary asks again
            self.guard.trip(error)
        elif error.fault is not EngineFault.REFUSED:  # an engine that refuses is well
            self.guard.failed(error)
        failures = self._owner.count_failure(items, error.fault)
        if any(one.hopeless(2 * self._settings.request_retries) for one in failures):
            tries = max(one.counted for one in failures)
            samples = ", ".join(str(item.sample_id) for item in items[:3])
            await self._owner.give_up(f"samples {samples}, ... cannot be scored, {tries} tries, last: {error}")

    def _count(self, wanted: Sequence[tuple[ScoreItem, list[Request]]], scores: Sequence[Sequence[Scores]]) -> None:
        new_tokens, flat = sum(item.response_tokens for item, _ in wanted), list(chain.from_iterable(scores))
        prompt_tokens = sum(score.prompt_tokens for score in flat)
        cached_tokens = sum(score.cached_tokens for score in flat)
        self._role.count("tokens", new_tokens)
        self._role.count("cached_tokens", cached_tokens)
        self._role.count("computed_tokens", prompt_tokens - cached_tokens)
        self._metrics["opd_teacher_scored_tokens_total"].inc(new_tokens)
        self._metrics["opd_teacher_cached_tokens_total"].inc(cached_tokens)
        self._metrics["opd_teacher_computed_tokens_total"].inc(prompt_tokens - cached_tokens)
        self._metrics["opd_teacher_batches_total"].inc()
        self._metrics["opd_teacher_batch_tokens"].observe(new_tokens)
        # what the engine has been sent before; the beginning of a sample it need not know
        before = [tokens for item, _ in wanted for tokens in self._owner.scored_before(item)]
        again = [(tokens, score) for tokens, score in zip(before, flat, strict=True) if tokens]
        self.cache.observe(sum(prefix for prefix, _ in again), sum(score.cached_tokens for _, score in again))
        self._metrics["opd_teacher_prefix_share"].labels(self.client.url).set(self.cache.share)

    # --- trust -------------------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Send a canary every `canary_every_s` and `canary_every_tokens`, and as the probe while the breaker is open.

        On cancel: nothing is lost.
        """
        while True:
            await self._until_due()
            if self._live is not None:
                await self._live.until_held()
            if not self.guard.closed:
                if not self._owner.is_last_usable(self):
                    self._owner.reroute(self.batcher.take_all())
                await self.guard.admission()
            if self._live is None or self._live.may_score:  # else the next `holds_weights` asks for one
                await self._send_canary()
            if self.guard.failing_s > self._outage_s and not self.guard.closed and self._owner.is_last_usable(self):
                text = f"{self.client.url} has not scored anything for {self.guard.failing_s:.0f} s; see its log"
                await self._owner.give_up(text)

    async def _until_due(self) -> None:
        """Wait for the time of the next canary, for its number of tokens, or for the breaker to open."""
        waits = [self.guard.until_open(self._settings.canary_every_s), self._canary_due.wait()]
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        self._canary_due.clear()

    async def suspect(self, text: str) -> None:
        """Say what this engine has scored since its last good canary. On cancel: it may or may not have been sent."""
        if scored := self._unproven.suspect():
            await self._owner.suspect(self.client.url, text, scored)
        self._proven.set()

    async def _send_canary(self) -> None:
        began, pauses = self._clock.now(), self._pauses
        problem: EngineError | CanaryError | None = None
        self._unproven.check_begins()
        try:
            await self.canary.check()
        except (EngineError, CanaryError) as error:
            problem = error
        aborted = isinstance(problem, EngineError) and problem.fault is EngineFault.ABORTED
        if self._live is not None and (aborted or self._pauses > pauses):
            self._unproven.unanswered()
            self._canary_due.set()  # the weights have changed meanwhile, or are about to: it says nothing of either
            return
        result = await self._judge(problem)
        self._role.count(f"canaries_{result}")
        self._metrics["opd_teacher_canaries_total"].labels(result).inc()
        self._role.trace.span(f"canary {self.client.url}", f"canary {result}", self._clock.now() - began)

    @property
    def _pauses(self) -> int:
        return 0 if self._live is None else self._live.pauses

    async def _judge(self, problem: EngineError | CanaryError | None) -> str:
        """Act on what a canary has found, and say what it is called."""
        if isinstance(problem, CanaryError):
            await self._distrust(problem)
            return "insane"
        if problem is not None:
            self._unproven.unanswered()
            if self._unproven.due:  # again at once, until the breaker opens
                self._canary_due.set()
            log.warning("canary: %s", problem)
            self.guard.failed(problem)
            return "failed"
        self._failed_checks = 0
        self._unproven.passed()
        self._proven.set()
        if not self.guard.closed:
            self.guard.succeeded()
            self._owner.engine_recovered()
        return "passed"

    async def _distrust(self, error: CanaryError) -> None:
        """Stop using this engine; after `FAILED_CANARIES` failed checks in a row, end the run."""
        log.error("canary: %s", error)
        self._failed_checks += 1
        self.guard.trip(error)
        await self._cancel_batches()
        await self.suspect(str(error))
        if self._failed_checks >= FAILED_CANARIES:
            await self._owner.give_up(str(error))
