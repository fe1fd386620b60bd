"""The responses that a rollout actor is generating, and waiting until every token that an engine sent has arrived."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from opd_async.actors.rollout.abort_and_collect import abort_and_collect
from opd_async.actors.rollout.generation import Generation, Student
from opd_async.clock import Clock
from opd_async.config.topology import PauseMode
from opd_async.errors import DeadlineError, EngineError

log = logging.getLogger(__name__)

PAUSE_DEADLINE_S = 60.0
COLLECT_DEADLINE_S = 15.0
"""How long a pause waits for tokens that an engine has made. Then their streams are closed, and made again."""


class Streams:
    """`live`: responses by sample id, until their last chunk has left."""

    def __init__(self, pause_mode: PauseMode, must_abort: bool, clock: Clock) -> None:
        """`must_abort`: the engine does not account for what it sent when it pauses; its requests are ended instead."""
        self._clock = clock
        self.live: dict[int, Generation] = {}
        self._pause_mode = pause_mode
        self._must_abort = must_abort
        self._arrived = asyncio.Condition()
        self._listeners = 0

    @property
    def running(self) -> int:
        """Responses that are being generated now."""
        return sum(1 for g in self.live.values() if g.finish is None and not g.away and g.student.gate.is_set())

    def may_abort(self, student: Student) -> bool:
        """Whether an aborted request is no failure: a pause aborts, this actor's or, behind a router, another's."""
        return self._must_abort and (student.routed or not student.gate.is_set())

    async def progressed(self) -> None:
        """Say that tokens have arrived, or a stream has ended. On cancel: nobody was told."""
        if not self._listeners:  # as nearly always: this is called for every event of every stream
            return
        async with self._arrived:
            self._arrived.notify_all()

    def move(self, student: Student) -> None:
        """End every request to an engine; what it has not sent yet, the next request of each response generates."""
        self._end(g for g in self.live.values() if g.student is student)

    @staticmethod
    def _end(generations: Iterable[Generation]) -> None:
        now = asyncio.get_running_loop().time()
        for generation in generations:
            if generation.scope is not None:
                generation.scope.reschedule(now)

    async def _close(self, late: Callable[[], list[Generation]], why: str) -> None:
        """Close the streams that are late, so that nothing more comes of them: no token that exists is unlisted then.

        Raises `DeadlineError` that names the streams which stay open. On cancel: they are being closed.
        """
        log.warning("pause: %s; %d responses go on from the tokens that are here", why, len(late()))
        self._end(late())
        try:
            with self._listening():
                async with self._clock.timeout(PAUSE_DEADLINE_S), self._arrived:
                    await self._arrived.wait_for(lambda: not late())
        except TimeoutError:
            names = ", ".join(generation.rid for generation in late()[:3])
            raise DeadlineError(f"pause: streams could not be closed in {PAUSE_DEADLINE_S:.0f} s: {names}") from None

    async def stop(self, student: Student) -> dict[str, int]:
        """Stop one engine; returns how many tokens it has sent to each stream, by request id.

        An engine that is gone has sent all that it ever will, and is not in the answer. The streams of one that does
        not stop are closed. On cancel: it may generate.
        """

        def open_streams() -> list[Generation]:
            return [g for g in self.live.values() if g.streaming and g.student is student]

        try:
            if not self._must_abort:
                return await student.client.pause(self._pause_mode.value)
            with self._listening():
                await abort_and_collect(student.client, open_streams, self._arrived, COLLECT_DEADLINE_S, self._clock)
        except (EngineError, DeadlineError) as error:
            await self._close(open_streams, str(error))
        return {}

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Have `progressed` wake those who wait; to be entered before they look at what they wait for."""
        self._listeners += 1
        try:
            yield
        finally:
            self._listeners -= 1

    async def all_arrived(self, emitted: dict[str, int]) -> None:
        """Wait until every live stream has received what its engine says it sent; those that have not in time are
        closed. On cancel: nothing has changed."""

        def missing() -> list[Generation]:
            live = self.live.values()
            return [g for g in live if not g.student.down and g.received < emitted.get(g.rid, 0)]

        try:
            with self._listening():
                async with self._clock.timeout(COLLECT_DEADLINE_S), self._arrived:
                    await self._arrived.wait_for(lambda: not missing())
        except TimeoutError:
            late = ", ".join(f"{g.rid} ({g.received} of {emitted[g.rid]})" for g in missing()[:3])
            await self._close(missing, f"tokens did not arrive in {COLLECT_DEADLINE_S:.0f} s: {late}")
