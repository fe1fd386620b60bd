"""Stop and go of generation: which tokens exist when the weights change.

    hold, drain, weight update -> close -> Pause to every actor -> Paused (samples and ends) -> ... -> open -> Resume

Between `close` and `open` no token is made, and every token made before is listed or already held by the intake: the
staleness bound rests on these lists (docs/staleness.md).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine
from typing import Any, Protocol

import numpy as np

from opd_async.plan.plan import RoleKind
from opd_async.transport import messages as m
from opd_async.transport.mailbox import Mailbox
from opd_async.transport.wire import Int32, Int64

PAUSE_DEADLINE_S = 120.0


class Reach(Protocol):
    """What the barrier needs of the dispatcher."""

    mailbox: Mailbox
    evaluated: asyncio.Event
    """Set while no evaluation is under way."""

    def up(self, kind: RoleKind) -> list[str]:
        """The connected roles of a kind."""

    async def broadcast(self, kind: RoleKind, message: m.Message) -> list[str]:
        """Send to every connected role of a kind; returns whom it reached."""

    async def to_intake(self, message: m.Message) -> None:
        """Send to the intake."""

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run in the background until the run ends."""


class Barrier:
    """One gate for all rollout actors."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._lock = asyncio.Lock()
        self._tokens = itertools.count(1)
        self._expected: dict[str, int] = {}
        self._owed: tuple[Int64, Int32, Int32] | None = None
        self._closed_at = time.monotonic()
        self.generating = False
        self.drained = False
        """Every token of the engines' version has been listed (S = 0): none may be made before the next update."""
        self.blocked_s = 0.0
        """Seconds for which generation has been stopped so far."""

    async def close(self, drain: bool = False) -> tuple[Int64, Int32, Int32]:
        """Stop generation; returns (sample ids, attempts, ends) of the tokens that exist and may not be held yet.

        With `drain` only weights of a new version open it again. Idempotent. Raises `DeadlineError` that names the
        actor that does not answer; an actor that dies meanwhile is not waited for.
        """
        async with self._lock:
            self.drained = self.drained or drain
            if self._owed is None:
                self.generating = False
                self._closed_at = time.monotonic()
                token = next(self._tokens)
                # an actor that cannot be reached is dying: its end is waited for too, so that its samples are reclaimed
                # before anybody relies on the list
                actors = self._reach.up(RoleKind.ROLLOUT)
                self._expected = dict.fromkeys(actors, token)
                await self._reach.broadcast(RoleKind.ROLLOUT, m.Pause(token))
                replies = [
                    await self._reach.mailbox.expect(("Paused", actor, token), PAUSE_DEADLINE_S, f"{actor} to pause")
                    for actor in actors
                ]
                self._expected = {}
                self._owed = _merge([reply for reply in replies if reply is not None])
            return self._owed

    async def open(self, version: int, new: bool = True) -> None:
        """Generate with weights `version`, which every student engine holds.

        When they are not `new` (an engine came back) and their tokens were drained, it stays closed: the list of the
        drain says that no further token of this version will be made.
        """
        async with self._lock:
            if self.drained and not new:
                return
            self._owed = None
            self.drained = False
            self.generating = True
            self.blocked_s += time.monotonic() - self._closed_at
            for kind in (RoleKind.TEACHER, RoleKind.ROLLOUT):
                await self._reach.broadcast(kind, m.Resume(version))

    def hold(self) -> None:
        """Close early, in the background: more is ready than the learner can take. The next update opens again.

        Not during an evaluation, which needs the engines and which the next update waits for.
        """
        if self.generating and self._reach.evaluated.is_set():
            self.generating = False
            self._reach.spawn(self._close_only(), "hold")

    async def _close_only(self) -> None:
        await self.close()

    def drain(self, version: int) -> None:
        """Close, then tell the intake which tokens of `version` exist (S = 0)."""
        self._reach.spawn(self._drain(version), "drain")

    async def _drain(self, version: int) -> None:
        await self._reach.evaluated.wait()
        await self._reach.to_intake(m.Drained(version, *await self.close(drain=True)))

    def absent(self, actor: str) -> None:
        """`actor` has died: do not wait for its answer."""
        token = self._expected.get(actor)
        if token is not None:
            self._reach.mailbox.deliver(("Paused", actor, token), None)

    def reset(self) -> None:
        """Every sample was forgotten; the gate is closed and owes nothing."""
        self._owed = None
        self.drained = False
        self.generating = False


def _merge(replies: list[m.Paused]) -> tuple[Int64, Int32, Int32]:
    if not replies:
        return np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32)
    return (
        np.concatenate([reply.sample_ids for reply in replies]),
        np.concatenate([reply.attempts for reply in replies]),
        np.concatenate([reply.ends for reply in replies]),
    )
