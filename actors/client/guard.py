"""One engine's circuit breaker as the tasks of an actor share it: who may send, and who waits."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import Any

from opd_async.errors import EngineError
from opd_async.scheduling.breaker import Breaker, BreakerState

log = logging.getLogger(__name__)


class Guard:
    """Wraps a breaker with the real clock, a gauge (1 while not closed), and something to wait for."""

    def __init__(self, url: str, gauge: Any) -> None:
        self.url = url
        self.breaker = Breaker(random.random)
        self._gauge = gauge
        self._healthy = asyncio.Event()
        self._ailing = asyncio.Event()
        self._healthy.set()
        gauge.set(0)

    @property
    def closed(self) -> bool:
        """Requests flow."""
        return self.breaker.state is BreakerState.CLOSED

    @property
    def failing_s(self) -> float:
        """Seconds for which nothing but failures came from this engine."""
        return self.breaker.failing_for(time.monotonic())

    async def admission(self) -> None:
        """Wait until one request may be sent: as one of many, or as the probe."""
        while not self.breaker.allow(time.monotonic()):
            delay = max(self.breaker.probe_at - time.monotonic(), 0.0)
            try:
                async with asyncio.timeout(delay):
                    await self._healthy.wait()
            except TimeoutError:
                pass

    async def until_closed(self) -> None:
        """Wait until requests flow; for those who leave the probe to another."""
        await self._healthy.wait()

    async def until_open(self, seconds: float) -> None:
        """Wait until requests stop flowing, at most so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._ailing.wait()
        except TimeoutError:
            pass

    def succeeded(self) -> None:
        """A request ended well."""
        self.breaker.succeeded()
        self._moved()

    def failed(self, error: EngineError) -> None:
        """A request failed."""
        self.breaker.failed(time.monotonic())
        self._moved(error)

    def trip(self, error: Exception) -> None:
        """The engine must not be used, whatever it answers."""
        self.breaker.trip(time.monotonic())
        self._moved(error)

    def reset(self) -> None:
        """The engine was started anew."""
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
