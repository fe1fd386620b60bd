"""Waiting for particular messages, with deadlines that name who is waited for."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from opd_async.errors import DeadlineError

MAX_UNREAD = 64
MAX_KEYS = 1024
"""Of unread messages: nobody waits for more than a handful at once."""


class Mailbox:
    """Messages by key. `deliver` never blocks; unread messages of a key, and keys, are bounded: the oldest go first."""

    def __init__(self) -> None:
        self._unread: dict[Hashable, deque[Any]] = {}
        self._waiting: dict[Hashable, asyncio.Future[None]] = {}
        self._failure: BaseException | None = None
        self.idle_s: Callable[[], float] = lambda: math.inf
        """Seconds since those who work for an answer last got something done."""
        self.witness: Callable[[str], str] = lambda who: "see the logs in the run's folder"
        """Says, of somebody who was waited for in vain, where to look."""

    def deliver(self, key: Hashable, message: Any) -> None:
        """Hand `message` to whoever waits for `key`, now or next."""
        if key not in self._unread and len(self._unread) >= MAX_KEYS:
            del self._unread[next(iter(self._unread))]
        self._unread.setdefault(key, deque(maxlen=MAX_UNREAD)).append(message)
        self._wake(key)

    async def expect(self, key: Hashable, deadline_s: float, who: str, at_work: bool = False) -> Any:
        """The next message of `key`. Raises `DeadlineError` that names `who`, or what `fail` was given.

        With `at_work` the deadline counts from when something was last got done (`idle_s`): what makes progress may
        take its time. One waiter per key at a time. On cancel: the message stays.
        """
        since, wait_s = time.strftime("%H:%M:%S"), deadline_s
        while not await self._there(key, wait_s):
            wait_s = deadline_s - self.idle_s() if at_work else 0.0
            if wait_s <= 0.0:
                raise DeadlineError(
                    f"timed out after {deadline_s:.0f} s waiting, since {since}, for {who}; {self.witness(who)}"
                )
        if self._failure is not None:
            raise self._failure
        return self._next(key)

    async def _there(self, key: Hashable, wait_s: float) -> bool:
        """Whether a message of `key`, or the failure of all waits, is there within `wait_s` seconds."""
        try:
            async with asyncio.timeout(wait_s):
                while self._failure is None and key not in self._unread:
                    self._waiting[key] = asyncio.get_running_loop().create_future()
                    await self._waiting[key]
        except TimeoutError:
            return False
        finally:
            self._waiting.pop(key, None)
        return True

    def _next(self, key: Hashable) -> Any:
        unread = self._unread[key]
        message = unread.popleft()
        if not unread:  # keys are many, one a step: none is kept for nothing
            del self._unread[key]
        return message

    def _wake(self, key: Hashable) -> None:
        future = self._waiting.get(key)
        if future is not None and not future.done():
            future.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Every wait, now and later, raises `error` until `clear`."""
        self._failure = error
        for key in self._waiting:
            self._wake(key)

    def clear(self) -> None:
        """Forget unread messages and the failure."""
        self._unread.clear()
        self._failure = None
