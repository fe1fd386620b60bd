"""What an engine has scored since it was last known to be the right teacher. Pure.

    scored -> unproven --a canary is sent--> checking --it passes--> proven, and forgotten
                 ^                               |
                 +------ it was not answered ----+      (it fails: all of both is suspect)

A canary proves what was scored before it was sent. So at most as much as `limit` is ever suspect, and what a batch has
more than was expected of it: none begins that should lead beyond the limit, unless nothing else is unproven.
"""

from __future__ import annotations

from typing import NamedTuple


class Scored(NamedTuple):
    """Response tokens [start, end) of a sample that were scored."""

    sample_id: int
    start: int
    end: int


class Unproven:
    """Of one engine. `limit`: in tokens."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight = 0
        self._scored: list[Scored] = []
        self._checking: list[Scored] = []
        self.tokens = 0
        """Scored, not known to be right."""

    def begins(self, tokens: int) -> None:
        """Note a batch that is sent."""
        self._in_flight += tokens

    def ends(self, tokens: int) -> None:
        """Note that a batch has ended, however it did."""
        self._in_flight -= tokens

    def scored(self, part: Scored) -> None:
        """Note what came of a batch."""
        self._scored.append(part)
        self.tokens += part.end - part.start

    def room(self, tokens: int) -> bool:
        """Whether a batch of so many tokens may begin before the next canary has passed."""
        unproven = self.tokens + self._in_flight
        return unproven == 0 or unproven + tokens <= self._limit

    @property
    def due(self) -> bool:
        """Whether it is time for a canary: in time for the next batches not to wait for it."""
        return 2 * self.tokens >= self._limit

    def check_begins(self) -> None:
        """A canary is sent now."""
        self._checking += self._scored
        self._scored = []

    def passed(self) -> None:
        """The canary has passed: what was scored before it is right."""
        self._checking = []
        self.tokens = sum(part.end - part.start for part in self._scored)

    def unanswered(self) -> None:
        """The canary was not answered: nothing is proven."""
        self._scored = self._checking + self._scored
        self._checking = []

    def suspect(self) -> list[Scored]:
        """Everything that is not proven, once: it is forgotten here."""
        found = self._checking + self._scored
        self._checking, self._scored, self.tokens = [], [], 0
        return found
