"""One engine's circuit breaker as the tasks of an actor share it: who may send, and who waits."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from opd_async.clock import Clock
from opd_async.errors import EngineError
from opd_async.scheduling.breaker import Breaker, BreakerState

log = logging.getLogger(__name__)


class Guard:
    """Wraps a breaker with a clock, a gauge (1 while not closed), and something to wait for."""

    def __init__(self, url: str, gauge: Any, clock: Clock) -> None:
        self.url = url
        self.breaker = Breaker(clock.random)
        self._clock = clock
        self._gauge = gauge
        self._healthy = asyncio.Event()
        self._ailing = asyncio.Event()
        self._healthy.set()
        gauge.set(0)

    @property
    def closed(self) -> bool:
        """Whether requests flow."""
        return self.breaker.state is BreakerState.CLOSED

    @property
    def failing_s(self) -> float:
        """Seconds for which nothing but failures came from this engine."""
        return self.breaker.failing_for(self._clock.now())

    async def admission(self) -> None:
        """Wait until one request may be sent: as one of many, or as the probe.

        On cancel: no probe was begun. A caller that is let through must report how its request ends.
        """
        while not self.breaker.allow(self._clock.now()):
            delay = max(self.breaker.probe_at - self._clock.now(), 0.0)
            try:
                async with self._clock.timeout(delay):
                    await self._healthy.wait()
            except TimeoutError:
                pass

    async def until_closed(self) -> None:
        """Wait until requests flow, and leave the probe to another. On cancel: nothing has changed."""
        await self._healthy.wait()

    async def until_open(self, seconds: float) -> None:
        """Wait until requests stop flowing, `seconds` at most. On cancel: nothing has changed."""
        try:
            async with self._clock.timeout(seconds):
                await self._ailing.wait()
        except TimeoutError:
            pass

    def succeeded(self) -> None:
        """Record a request that ended well, whenever it was sent: the breaker closes."""
        self.breaker.succeeded()
        self._moved()

    def failed(self, error: EngineError) -> None:
        """Record a failed request; the breaker opens after some in a row."""
        self.breaker.failed(self._clock.now())
        self._moved(error)

    def trip(self, error: Exception) -> None:
        """Open at once: the engine must not be used, whatever it answers."""
        self.breaker.trip(self._clock.now())
        self._moved(error)

    def reset(self) -> None:
        """Close: the engine was started anew, and earlier failures are not held against it."""
        self.breaker.reset()
        self._moved()

    def _moved(self, error: Exception | None = None) -> None:
        """Tell those who wait, and the log, when requests begin or cease to flow."""
        if self.closed == self._healthy.is_set():
            return
        self._gauge.set(0 if self.closed else 1)
        if self.closed:
            self._healthy.set()
            self._ailing.clear()
            log.info("%s: requests flow again", self.url)
        else:
            self._ailing.set()
            self._healthy.clear()
            log.warning("%s: no requests until it recovers; last: %s", self.url, error)
