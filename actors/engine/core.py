"""The engine's loop: steps on the model thread, state changes only between them.

    submit/abort (HTTP) -> Scheduler -> plan -> build_batch -> [model thread: ModelRunner.step] -> deliver -> Requests

    loop      waits for                         unblocked by
    run       a request, or continue            submit, resume
    step      the model thread                  its result
    pause     the running step, then streams    the step's end, the HTTP side's writes

All methods run on the event loop. Control operations hold `between_steps`, so they never see a half-done step.
On cancel of `run` the step in flight is dropped and requests stay unfinished.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import TypeVar

from opd_async.actors.engine.batch import Batch, RowParams, build_batch
from opd_async.actors.engine.errors import ApiError
from opd_async.actors.engine.metrics import EngineMetrics
from opd_async.actors.engine.model import Runner, StepResult
from opd_async.actors.engine.request import Request, TopRows
from opd_async.actors.engine.scheduler import Limits, Scheduler
from opd_async.actors.engine.threads import WorkerThread

T = TypeVar("T")

# A client that does not read its stream may hold up a pause for this long.
STREAM_DRAIN_SECONDS = 5.0
RECENT_STEPS = 256
"""Among so many steps there is a long prefill, if there are any."""


class PauseMode(StrEnum):
    """What happens to running requests when generation pauses."""

    ABORT = "abort"
    """They finish with what they have."""
    RETRACT = "retract"
    """They lose their KV and are prefilled again on continue."""
    IN_PLACE = "in_place"
    """They keep their KV."""


class EngineCore:
    """Continuous batching over one model."""

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        weight_version: str,
        metrics: EngineMetrics,
        matched_stop: Callable[[Request], str | None] | None = None,
    ) -> None:
        self.scheduler = Scheduler(limits)
        self.metrics = metrics
        self.weight_version = weight_version
        self.paused: PauseMode | None = None
        self.requests: dict[str, Request] = {}
        self.generated_tokens = 0
        self.busy_seconds = 0.0
        self.step_began: float | None = None
        """When the step under way began, on `time.perf_counter`'s scale; None between steps."""
        self.step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        """How long the last steps took."""
        self._runner = runner
        self._matched_stop = matched_stop
        self._row_params = RowParams(limits.max_running)
        self.scheduler.on_admit = self._admitted
        self._thread = WorkerThread("model")
        self._step_lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._sent = asyncio.Event()
        self._settled = asyncio.Event()
        self._holds = 0
        self._aborting: list[Request] = []

    async def run(self) -> None:
        """Step until cancelled. An exception of the model ends the loop: the KV pool can't be trusted afterwards."""
        try:
            while True:
                await self._wake.wait()
                async with self._step_lock:
                    await self._step()
        finally:
            self._thread.stop()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ApiError (400) when its rid is in use."""
        if request.rid in self.requests:
            raise ApiError(f"Duplicate request ID detected: {request.rid} is in progress")
        # Submitting between plan and delivery is safe: a step only touches the requests that it planned.
        self.requests[request.rid] = request
        self.scheduler.submit(request)
        self._wake.set()

    def forget(self, request: Request) -> None:
        """Free the rid of a request that the HTTP side is done with; abort it if it still runs."""
        self.requests.pop(request.rid, None)
        if not request.finished:
            self._abort(request)
        self.note_sent()

    def abort(self, prefix: str, everything: bool = False) -> None:
        """Abort all requests whose rid starts with `prefix`, as SGLang matches it; unknown ones are ignored."""
        for request in list(self.requests.values()):
            if not request.finished and (everything or (prefix and request.rid.startswith(prefix))):
                self._abort(request)

    async def pause(self, mode: PauseMode) -> dict[str, int]:
        """Stop after the running step; returns how many response tokens each live stream has been given, by rid.

        When it returns those tokens have been written to the streams, unless a client does not read.
        """
        # Set before the lock is asked for, or a step could start between this call and the lock.
        self.paused = mode
        async with self.between_steps():
            if mode is PauseMode.ABORT:
                self.abort("", everything=True)
                self._sweep()
            elif mode is PauseMode.RETRACT:
                self.metrics.retractions.inc(self.scheduler.retract_all())
            self.flush_streams()
        # Weight operations that wait for idleness may go on now.
        self._settled.set()
        # Outside the lock: the HTTP side and other control calls go on meanwhile.
        await self._drain_streams()
        return {request.rid: request.ready for request in self.requests.values() if request.stream}

    def resume(self) -> None:
        """Go on after a pause; without one, nothing happens."""
        self.paused = None
        self._wake.set()

    def flush_streams(self) -> None:
        """Make every sampled token sendable, so that no event waits across a change of weights."""
        for request in self.requests.values():
            if request.stream and not request.finished:
                request.release()

    def note_sent(self) -> None:
        """Note that the HTTP side has written an event, which is what `pause` waits for."""
        self._sent.set()

    def set_weight_version(self, version: str) -> None:
        """Have all tokens that are sampled from now on carry `version`."""
        self.flush_streams()
        self.weight_version = version

    @asynccontextmanager
    async def between_steps(self) -> AsyncIterator[None]:
        """Hold off the next step until the context ends; waits for the running step first."""
        async with self._step_lock:
            yield

    @asynccontextmanager
    async def quiet(self, timeout: float) -> AsyncIterator[None]:
        """Exclusive use of the weights: at once when paused, else when all earlier requests have finished.

        Later requests queue up meanwhile. Raises ApiError (503) after `timeout` seconds.
        """
        self._holds += 1
        if self.scheduler.hold_from is None:
            self.scheduler.hold_from = self.scheduler.next_serial
        try:
            async with asyncio.timeout(timeout):
                while self.paused is None and not self.scheduler.idle():
                    self._settled.clear()
                    await self._settled.wait()
            async with self.between_steps():
                yield
        except TimeoutError as error:
            running = len(self.scheduler.running)
            message = f"{running} requests still ran after {timeout:g} s; pause generation before changing weights"
            raise ApiError(message, 503) from error
        finally:
            self._holds -= 1
            if not self._holds:
                self.scheduler.hold_from = None
            self._wake_if_busy()

    async def on_model_thread(self, function: Callable[[], T]) -> T:
        """Run `function` where steps run; the caller holds between_steps or quiet."""
        return await self._thread.run(function)

    async def _step(self) -> None:
        self._sweep()
        works = [] if self.paused else self.scheduler.plan()
        if not works:
            self._wake.clear()
            self._settled.set()
            self._observe()
            return
        started = time.perf_counter()
        batch = build_batch(works, self.scheduler.table, self._row_params)
        self.step_began = started
        try:
            result = await self.on_model_thread(lambda: self._runner.step(batch))
        finally:
            self.step_began = None
        before = self.generated_tokens
        self._deliver(batch, result)
        elapsed = time.perf_counter() - started
        self.step_seconds.append(elapsed)
        self.busy_seconds += elapsed
        self.metrics.busy.inc(elapsed)
        self.metrics.steps.inc()
        self.metrics.generated.inc(self.generated_tokens - before)
        self._observe()

    def _deliver(self, batch: Batch, result: StepResult) -> None:
        """Hand a step's results to its requests and release those that ended."""
        if batch.score is not None:
            for row, (request, _) in enumerate(batch.score.spans):
                request.input_logprobs.append(result.score[row])
                if request.logprob.top:
                    request.input_top.append(_narrow(result.score_top[row], request.logprob.top))
                if request.logprob.ids:
                    request.input_ids_logprobs.append(result.score_ids[row])
        # Before the sampled tokens are appended: sharing covers exactly the tokens that have KV.
        self.scheduler.commit(batch.works)
        if batch.sample is not None:
            self._append(batch.sample.requests, result)
        for work in batch.works:
            request = work.request
            if request.prefill_only and work.completes:
                request.finish({"type": "length", "length": 0}, self.weight_version)
            if request.finished:
                self._release(request)

    def _append(self, requests: list[Request], result: StepResult) -> None:
        version = self.weight_version
        for row, (request, token, logprob) in enumerate(zip(requests, result.tokens, result.logprobs, strict=True)):
            if request.logprob.top and result.top is not None:
                values, ids = result.top
                request.output_top.append(_narrow((values[row : row + 1], ids[row : row + 1]), request.logprob.top))
            if request.logprob.ids:
                request.output_ids_logprobs.append(result.ids_logprobs[row])
            # A scoring request wanted the row, not the token.
            if request.prefill_only:
                continue
            request.append(token, logprob, version)
            self.generated_tokens += 1
            if request.params.stop and self._matched_stop is not None and not request.finished:
                stop = self._matched_stop(request)
                if stop is not None:
                    request.finish({"type": "stop", "matched": stop}, version)

    def _abort(self, request: Request) -> None:
        """End a request. One that runs is taken out between steps, before anything else is planned."""
        # Its KV may be written by a step in flight; waiting requests have none.
        if request.table_row >= 0:
            self._aborting.append(request)
            self._wake.set()
            return
        request.finish({"type": "abort", "message": "Abort in waiting queue"}, self.weight_version)
        self._release(request)

    def _sweep(self) -> None:
        """Take out running requests that were asked to abort."""
        for request in self._aborting:
            if not request.finished:
                reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
                request.finish(reason, self.weight_version)
                self._release(request)
        self._aborting.clear()

    def _release(self, request: Request) -> None:
        self.scheduler.release(request)
        self.metrics.requests.inc()

    def _admitted(self, request: Request) -> None:
        self._row_params.set(request.table_row, request.params)
        # A retracted request comes by again; its prompt counts once.
        if request.num_retractions == 0:
            self.metrics.prompt.inc(len(request.input_ids))
            self.metrics.cached.inc(request.cached_tokens or 0)

    def _observe(self) -> None:
        scheduler, metrics = self.scheduler, self.metrics
        metrics.running.set(len(scheduler.running))
        metrics.waiting.set(len(scheduler.waiting))
        metrics.kv_used.set(scheduler.used_tokens)
        metrics.kv_cached.set(scheduler.cache.evictable_tokens)

    def _wake_if_busy(self) -> None:
        if self.scheduler.running or self.scheduler.waiting:
            self._wake.set()

    async def _drain_streams(self) -> None:
        try:
            async with asyncio.timeout(STREAM_DRAIN_SECONDS):
                while any(r.stream and r.sent < r.ready for r in self.requests.values()):
                    self._sent.clear()
                    await self._sent.wait()
        except TimeoutError:
            # A client that stopped reading: its tokens are queued in order and reach it when it reads on.
            return


def _narrow(rows: TopRows, k: int) -> TopRows:
    return rows[0][:, :k], rows[1][:, :k]
