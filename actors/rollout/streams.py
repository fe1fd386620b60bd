"""The responses that a rollout actor is generating, and waiting until every token that an engine sent has arrived."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from opd_async.actors.rollout.draining import drain
from opd_async.actors.rollout.generation import Generation, Student
from opd_async.config.topology import PauseMode
from opd_async.errors import DeadlineError, EngineError

log = logging.getLogger(__name__)

PAUSE_DEADLINE_S = 60.0


class Streams:
    """`live`: responses by sample id, until their last chunk has left."""

    def __init__(self, pause_mode: PauseMode, drains: bool) -> None:
        """`drains`: the engine does not account for what it sent when it pauses; its requests are ended instead."""
        self.live: dict[int, Generation] = {}
        self._pause_mode = pause_mode
        self._drains = drains
        self._arrived = asyncio.Condition()
        self._listeners = 0

    @property
    def running(self) -> int:
        """Responses that are being generated now."""
        return sum(1 for g in self.live.values() if g.finish is None and g.student.gate.is_set())

    async def progressed(self) -> None:
        """Tokens have arrived, or a stream has ended."""
        if not self._listeners:  # as nearly always: this is called for every event of every stream
            return
        async with self._arrived:
            self._arrived.notify_all()

    async def stop(self, student: Student) -> dict[str, int]:
        """Stop one engine. Tokens that it has sent to each stream; an engine that is gone has sent all that it ever
        will."""
        if self._drains:

            def open_streams() -> list[Generation]:
                return [g for g in self.live.values() if g.streaming and g.student is student]

            with self._listening():
                await drain(student.client, open_streams, self._arrived, PAUSE_DEADLINE_S)
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
        """Wait until every live stream has received what its engine says it sent; `DeadlineError` names those that have
        not."""

        def missing() -> list[Generation]:
            live = self.live.values()
            return [g for g in live if not g.student.down and g.received < emitted.get(g.rid, 0)]

        try:
            with self._listening():
                async with asyncio.timeout(PAUSE_DEADLINE_S), self._arrived:
                    await self._arrived.wait_for(lambda: not missing())
        except TimeoutError:
            late = ", ".join(f"{g.rid} ({g.received} of {emitted[g.rid]})" for g in missing()[:3])
            raise DeadlineError(
                f"pause: tokens that the engines sent did not arrive in {PAUSE_DEADLINE_S:.0f} s: {late}"
            ) from None
