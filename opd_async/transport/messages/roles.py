"""What every role tells the dispatcher, and is told by it at the end."""

from __future__ import annotations

from dataclasses import dataclass

from opd_async.transport.wire import message


@message
@dataclass(frozen=True, slots=True)
class Hello:
    """A role is up; `incarnation` tells one start of it from the next, on whichever host."""

    role: str
    incarnation: str


@message
@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A role is alive; `counters` are its running totals (tokens, idle seconds, ...) for the report."""

    role: str
    counters: dict[str, float]


@message
@dataclass(frozen=True, slots=True)
class RankBeat:
    """A learner rank is alive, and `doing` a command for `for_s` seconds; nothing if it waits for one.

    `usual_s`: the longest of the last such commands, in seconds; 0 where it says nothing of the next.
    `still_s`: seconds for which nothing of the command was got done.
    """

    rank: int
    doing: str
    for_s: float
    usual_s: float
    still_s: float


@message
@dataclass(frozen=True, slots=True)
class Failure:
    """A role cannot go on; the run ends with this text."""

    role: str
    text: str


@message
@dataclass(frozen=True, slots=True)
class Stop:
    """Finish what is being sent and exit with code 0."""

    reason: str
