"""How fast the engines of an actor answer, told to the dispatcher, who compares them with their peers."""

from __future__ import annotations

from collections.abc import Sequence

from opd_async.role import Role
from opd_async.scheduling.pace import Answers
from opd_async.transport import messages as m

TELL_S = 0.5


class Pacing:
    """The answers of each engine. While `paused`, no engine is to answer, and nothing is told."""

    def __init__(self, role: Role, urls: Sequence[str], streams: bool) -> None:
        self._role = role
        self._answers = {url: Answers(streams) for url in urls}
        self.paused = False

    def of(self, url: str) -> Answers:
        """Where the answers of an engine are noted; KeyError for one that is not measured."""
        return self._answers[url]

    def resume(self) -> None:
        """Engines are to answer again. The time before counts for none of them."""
        self.paused = False
        for answers in self._answers.values():
            answers.resumed(self._role.clock.now())

    async def tell(self) -> None:
        """Say again and again how fast each engine answers, if it has something to answer. On cancel: as is."""
        while True:
            await self._role.clock.sleep(TELL_S)
            now = self._role.clock.now()
            for url, answers in self._answers.items():
                pace = None if self.paused else answers.pace(now)
                if pace is not None:
                    await self._role.control.send(m.EnginePace(url, pace.answers, pace.wait_s, pace.token_s))
