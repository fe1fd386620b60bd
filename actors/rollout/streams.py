"""The responses that a rollout actor is generating, and waiting until every token that an engine sent has arrived."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from opd_async.actors.rollout.abort_and_collect import abort_and_collect
from opd_async.actors.rollout.generation import Generation, Student
from opd_async.clock import Clock
from opd_async.config.topology import PauseMode
from opd_async.errors import DeadlineError, EngineError

log = logging.getLogger(__name__)

PAUSE_DEADLINE_S = 60.0


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
        return sum(1 for g in self.live.values() if g.finish is None and g.student.gate.is_set())

    def may_abort(self, student: Student) -> bool:
        """Whether an aborted request is no failure: a pause aborts, this actor's or, behind a router, another's."""
        return self._must_abort and (student.routed or not student.gate.is_set())

    async def progressed(self) -> None:
        """Say that tokens have arrived, or a stream has ended. On cancel: nobody was told."""
        if not self._listeners:  # as nearly always: this is called for every event of every stream
            return
        async with self._arrived:
            self._arrived.notify_all()

    async def stop(self, student: Student) -> dict[str, int]:
        """Stop one engine; returns how many tokens it has sent to each stream, by request id.

        An engine that is gone has sent all that it ever will, and is not in the answer. On cancel: it may generate.
        """
        if self._must_abort:

            def open_streams() -> list[Generation]:
                return [g for g in self.live.values() if g.streaming and g.student is student]

            with self._listening():
                await abort_and_collect(student.client, open_streams, self._arrived, PAUSE_DEADLINE_S, self._clock)
            return {}
        try:
            return await student.client.pause(self._pause_mode.value)
        except EngineError as error:
            log.warning("pause: %s; its responses go on when it is back", error)
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
        """Wait until every live stream has received what its engine says it sent. On cancel: nothing has changed.

        Raises `DeadlineError` that names the streams which have not.
        """

        def missing() -> list[Generation]:
            live = self.live.values()
            return [g for g in live if not g.student.down and g.received < emitted.get(g.rid, 0)]

        try:
            with self._listening():
                async with self._clock.timeout(PAUSE_DEADLINE_S), self._arrived:
                    await self._arrived.wait_for(lambda: not missing())
        except TimeoutError:
            late = ", ".join(f"{g.rid} ({g.received} of {emitted[g.rid]})" for g in missing()[:3])
            raise DeadlineError(
                f"pause: tokens that the engines sent did not arrive in {PAUSE_DEADLINE_S:.0f} s: {late}"
            ) from None
