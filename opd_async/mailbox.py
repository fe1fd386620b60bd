"""Waiting for particular messages, with deadlines that name who is waited for."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Hashable
from typing import Any

from opd_async.errors import DeadlineError

MAX_UNREAD = 64


class Mailbox:
    """Messages by key. `deliver` never blocks; unread messages of one key are bounded, the oldest go first."""

    def __init__(self) -> None:
        self._unread: dict[Hashable, deque[Any]] = defaultdict(lambda: deque(maxlen=MAX_UNREAD))
        self._waiting: dict[Hashable, asyncio.Future[Any]] = {}
        self._failure: BaseException | None = None

    def deliver(self, key: Hashable, message: Any) -> None:
        """Hand `message` to whoever waits for `key`, now or next."""
        future = self._waiting.get(key)
        if future is not None and not future.done():
            future.set_result(message)
        else:
            self._unread[key].append(message)

    async def expect(self, key: Hashable, deadline_s: float, who: str) -> Any:
        """The next message of `key`. Raises `DeadlineError` that names `who`, or what `fail` was given.

        One waiter per key at a time. On cancel: the message stays.
        """
        if self._failure is not None:
            raise self._failure
        if self._unread[key]:
            return self._unread[key].popleft()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[key] = future
        try:
            async with asyncio.timeout(deadline_s):
                return await future
        except TimeoutError:
            raise DeadlineError(
                f"waited {deadline_s:.0f} s for {who} in vain; see its log in the run's folder"
            ) from None
        finally:
            self._waiting.pop(key, None)

    def fail(self, error: BaseException) -> None:
        """Every wait, now and later, raises `error` until `clear`."""
        self._failure = error
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    def clear(self) -> None:
        """Forget unread messages and the failure."""
        self._unread.clear()
        self._failure = None
