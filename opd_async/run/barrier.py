"""Stop and go of generation: which tokens exist when the weights change.

    close_early, drain, weight update -> close -> Pause to every actor -> Paused (samples, ends) -> open -> Resume

    OPEN --close--> CLOSING --every actor has answered--> CLOSED --open--> OPEN
                                                          DRAINED (S = 0) --open with new weights--> OPEN

Between `close` and `open` no token is made, and every token made before is listed or already held by the intake: the
staleness bound rests on these lists (docs/staleness.md).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Coroutine, Hashable
from enum import Enum, auto
from typing import Any, Protocol

from opd_async.plan.plan import RoleKind
from opd_async.telemetry.trace import Trace
from opd_async.transport import messages as m
from opd_async.transport.mailbox import Mailbox
from opd_async.transport.owed import Owed

PAUSE_DEADLINE_S = 120.0


class Reach(Protocol):
    """What the barrier needs of the dispatcher."""

    mailbox: Mailbox
    evaluated: asyncio.Event
    """Set while no evaluation is under way."""
    trace: Trace

    def up(self, kind: RoleKind) -> list[str]:
        """The connected roles of a kind."""

    async def broadcast(self, kind: RoleKind, message: m.Message) -> list[str]:
        """Send to every connected role of a kind; returns whom it reached."""

    async def to_intake(self, message: m.Message) -> None:
        """Send to the intake."""

    async def answer(self, key: Hashable, deadline_s: float, who: str, role: str) -> Any:
        """What `role` answers, or None once it has died; one that does not answer is killed."""

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run in the background until the run ends."""


class BarrierState(Enum):
    """Whether tokens are made, and whether all that exist are listed."""

    OPEN = auto()
    """The engines generate."""
    CLOSING = auto()
    """They are being stopped, or have never been started: tokens may exist that nobody has listed."""
    CLOSED = auto()
    """They stand, and every token is listed. Any weights open again."""
    DRAINED = auto()
    """The same, and the intake was told so (S = 0): no further token of this version may be made, so that only new
    weights open again."""


class Barrier:
    """One switch for the gates of all rollout actors."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._lock = asyncio.Lock()
        self._requests = itertools.count(1)
        self._expected: dict[str, int] = {}
        """The number of the `Pause` that each actor has still to answer."""
        self._owed: Owed | None = None
        """What exists, while CLOSED or DRAINED."""
        self._closed_at = time.monotonic()
        self.state = BarrierState.CLOSING
        self.scores_stopped = False
        """The student's engines are being sent weights, and score nothing meanwhile."""
        self.blocked_s = 0.0
        """Seconds for which generation has been stopped so far."""

    async def close(self, drain: bool = False) -> Owed:
        """Stop generation; returns the tokens that exist and may not be held yet.

        With `drain` only weights of a new version open again. Idempotent. An actor that does not answer is killed, and
        one that dies meanwhile is not waited for. On cancel: it stays CLOSING, and the next `close` asks every actor
        again.
        """
        async with self._lock:
            if self._owed is None:
                self._begin_closing()
                self._owed = await self._pause(RoleKind.ROLLOUT)
                self.state = BarrierState.CLOSED
            if drain:
                self.state = BarrierState.DRAINED
            return self._owed

    async def stop_scores(self) -> None:
        """Have nothing scored by the student's engines until they hold weights that are named.

        Idempotent; the next `open` has them score again. On cancel: some teacher actors may have stopped, and the next
        call asks all of them.
        """
        async with self._lock:
            self.scores_stopped = True
            await self._pause(RoleKind.TEACHER)

    def _begin_closing(self) -> None:
        self.state = BarrierState.CLOSING
        self._closed_at = time.monotonic()

    async def _pause(self, kind: RoleKind) -> Owed:
        request = next(self._requests)
        # an actor that cannot be reached is dying: its end is waited for too, so that its samples are reclaimed
        # before anybody relies on the list
        actors = self._reach.up(kind)
        self._expected = dict.fromkeys(actors, request)
        await self._reach.broadcast(kind, m.Pause(request))
        replies = [
            await self._reach.answer(("Paused", actor, request), PAUSE_DEADLINE_S, f"{actor} to pause", actor)
            for actor in actors
        ]
        self._expected = {}
        return Owed.merged(reply for reply in replies if reply is not None)

    async def open(self, version: int, new: bool = True) -> None:
        """Generate with weights `version`, which every student engine holds.

        When they are not `new` (an engine came back) and their tokens were drained, it stays closed. On cancel: the
        barrier is open, though some actors may not know it yet; the next `close` stops those that do.
        """
        async with self._lock:
            stopped, self.scores_stopped = self.scores_stopped, False
            if self.state is BarrierState.DRAINED and not new:
                if stopped:  # what was drained is still to be scored
                    await self._reach.broadcast(RoleKind.TEACHER, m.Resume(version))
                return
            self._owed = None
            self.state = BarrierState.OPEN
            stopped_s = time.monotonic() - self._closed_at
            self.blocked_s += stopped_s
            self._reach.trace.span("generation", f"stopped until weights {version}", stopped_s)
            for kind in (RoleKind.TEACHER, RoleKind.ROLLOUT):
                await self._reach.broadcast(kind, m.Resume(version))

    def close_early(self) -> None:
        """Close in the background: more is ready than the learner can take. The next update opens again.

        Not during an evaluation, which needs the engines and which the next update waits for.
        """
        if self.state is BarrierState.OPEN and self._reach.evaluated.is_set():
            self.state = BarrierState.CLOSING
            self._reach.spawn(self._close_only(), "close-early")

    async def _close_only(self) -> None:
        await self.close()

    def drain(self, version: int) -> None:
        """Close, then tell the intake which tokens of `version` exist (S = 0)."""
        self._reach.spawn(self._drain(version), "drain")

    async def _drain(self, version: int) -> None:
        await self._reach.evaluated.wait()
        owed = await self.close(drain=True)
        await self._reach.to_intake(m.Drained(version, owed.sample_ids, owed.attempts, owed.ends))

    def expects(self, actor: str, request: int) -> bool:
        """Whether `actor` has this `Pause` still to answer."""
        return self._expected.get(actor) == request

    def paused(self, actor: str, paused: m.Paused) -> None:
        """Hand over the answer of an actor from which it is expected."""
        del self._expected[actor]
        self._reach.mailbox.deliver(("Paused", actor, paused.request), paused)

    def absent(self, actor: str) -> None:
        """`actor` has died: do not wait for its answer."""
        request = self._expected.pop(actor, None)
        if request is not None:
            self._reach.mailbox.deliver(("Paused", actor, request), None)

    def reset(self) -> None:
        """Every sample was forgotten: the next `close` asks every actor again."""
        self._owed = None
        self.state = BarrierState.CLOSING
