"""Which processes hang: those that give no sign of life, and those that never end what they are doing. Pure: no clock.

A sign of life comes from a thread or a task of its own, which no long step holds up. It proves that the process is
scheduled at all: a process that is stopped or swapped out gives none. It does not prove that the work goes on: a rank
that waits for ever inside a collective still beats. So a sign says too what the process is doing, for how long, and how
long the same has lately taken; what takes many times as long is taken for a deadlock. Where the parts of a piece of
work are seen, only the time without any counts: a step of more micro-batches than ever is no deadlock.
"""

from __future__ import annotations

from dataclasses import dataclass

TIMES_AS_LONG = 20.0
"""A step hangs when it takes so many times as long as the longest of the last ones."""
PATIENCE = 0.8
"""Whatever has lasted for this share of the longest time allowed hangs, before those who wait for it give up."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a process says that it is doing: `command`, for `for_s` seconds; lately the same took `usual_s` at most.

    `usual_s` is 0 where nothing is known, or where one such command says nothing of the next.
    """

    command: str
    for_s: float
    usual_s: float = 0.0
    still_s: float | None = None
    """For how long nothing of it was got done; None where nothing is seen of it before its end."""

    @property
    def without_progress_s(self) -> float:
        """Seconds for which it may have been stuck."""
        return self.for_s if self.still_s is None else min(self.still_s, self.for_s)

    def later(self, seconds: float) -> Work:
        """The same so many seconds later, if nothing has happened."""
        still_s = None if self.still_s is None else self.still_s + seconds
        return Work(self.command, self.for_s + seconds, self.usual_s, still_s)


@dataclass(slots=True)
class _Sign:
    heard: float
    work: Work | None = None


class Liveness:
    """The last sign of life of each process. Times are seconds of any monotonic clock."""

    def __init__(self, silence_s: float, longest_s: float) -> None:
        """`silence_s`: how long a process may give no sign; `longest_s`: how long one piece of work may take."""
        self._silence_s = silence_s
        self._longest_s = longest_s
        self._signs: dict[str, _Sign] = {}

    def heard(self, who: str, now: float, work: Work | None = None) -> None:
        """Note a sign of life; `work` None: the process is doing nothing that could hang."""
        self._signs[who] = _Sign(now, work)

    def spoke(self, who: str, now: float) -> None:
        """Note a sign of life that says nothing of the work."""
        self._signs.setdefault(who, _Sign(now)).heard = now

    def forget(self, who: str) -> None:
        """Expect nothing of a process that has ended, until it is heard again."""
        self._signs.pop(who, None)

    def absent(self, seconds: float) -> None:
        """Add seconds in which nobody could be heard, because the listener itself stood still."""
        for sign in self._signs.values():
            sign.heard += seconds

    def silent_s(self, who: str, now: float) -> float:
        """Seconds since the last sign of a process; 0 for one of which nothing is expected."""
        return now - self._signs[who].heard if who in self._signs else 0.0

    def hanging(self, now: float) -> dict[str, str]:
        """The processes that hang, with what is wrong in words, each until it is forgotten or gives a better sign."""
        found = {who: self._problem(sign, now) for who, sign in self._signs.items()}
        return {who: problem for who, problem in found.items() if problem is not None}

    def working(self, now: float) -> dict[str, Work]:
        """What each process that works is doing, brought up to `now`."""
        signs = {who: (sign, sign.work) for who, sign in self._signs.items()}
        return {who: work.later(now - sign.heard) for who, (sign, work) in signs.items() if work is not None}

    def allowed_s(self, work: Work) -> float:
        """How long a piece of work, or the next part of it, may take, in seconds."""
        most = PATIENCE * self._longest_s
        return min(max(TIMES_AS_LONG * work.usual_s, self._silence_s), most) if work.usual_s > 0 else most

    def _problem(self, sign: _Sign, now: float) -> str | None:
        silent_s, work = now - sign.heard, sign.work
        if silent_s > self._silence_s:
            doing = "" if work is None else f"; it was at {work.command} then"
            return f"no sign of life for {silent_s:.0f} s{doing}"
        if work is not None and work.without_progress_s > self.allowed_s(work):
            usual = f"; the last ones took {work.usual_s:.1f} s at most" if work.usual_s > 0 else ""
            still = f", nothing of it done for {work.still_s:.0f} s" if work.still_s is not None else ""
            return f"at {work.command} for {work.for_s:.0f} s{still}{usual}"
        return None
