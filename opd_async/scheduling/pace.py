"""Which engines are far slower than their peers, so that work goes elsewhere. Pure: times are parameters, in seconds.

    Answers (in an actor, one of each engine)   how long answers take, by the median: `Pace`
    Paces   (in the launcher, of all engines)   whose pace is many times that of its peers: `slow`, until it is tried

An engine is slow when it takes many times as long as the median of its peers, both for an answer and for each token of
it: long answers alone may be large ones, and few tokens in each may be a matter of the work. Medians do not mind a
pause, a first answer behind a queue, or a single long prefill. An engine without peers at work is not judged.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

WINDOW_S = 20.0
"""Answers that are older say nothing of the pace."""
MAX_ANSWERS = 64
MIN_ANSWERS = 3
LONG_S = 30.0
"""Fewer answers say something only if they take so long."""
LEAST_WAIT_S = 1.0
"""An answer that takes less is never slow: a process that waits for a processor for so long is no broken engine."""
IN_A_ROW = 4
"""So many paces in a row that are slow make a slow engine."""
FRESH_S = 10.0
"""A pace that is older is none to compare with."""
REST_S = 60.0
MAX_REST_S = 1800.0
"""Seconds without work before a slow engine is tried again: the first time, and at most. They double in between."""


class Pace(NamedTuple):
    """Medians over the last answers of one engine."""

    answers: int
    wait_s: float
    """Seconds for an answer: an event of a stream, a scored batch."""
    token_s: float
    """Seconds for each token."""


class Answers:
    """How long one engine takes to answer, as the actor that asks it sees it.

    What is still being waited for counts with the time so far, once that is longer than the median of the answers.
    Streams that have had no answer yet may wait in the engine's queue: they count only where nothing is answered.
    """

    def __init__(self, streams: bool) -> None:
        """`streams`: a request has many answers, not one."""
        self._streams = streams
        self._last: deque[tuple[float, float, float]] = deque(maxlen=MAX_ANSWERS)
        """When, the seconds it took, and the seconds for each token."""
        self._open: dict[Hashable, tuple[float, bool]] = {}
        """Since when each request waits for its next answer, and whether it has had one."""

    def asked(self, request: Hashable, now: float) -> None:
        """Note a request that was sent."""
        self._open[request] = (now, False)

    def answered(self, request: Hashable, now: float, tokens: int) -> None:
        """Note `tokens` tokens in answer to a request, which may go on to wait for more."""
        since = self._open.get(request)
        if since is None or tokens <= 0:
            return
        wait_s = max(now - since[0], 0.0)
        self._last.append((now, wait_s, wait_s / tokens))
        self._open[request] = (now, True)

    def ended(self, request: Hashable) -> None:
        """Wait for a request no more, however it ended."""
        self._open.pop(request, None)

    def resumed(self, now: float) -> None:
        """Count no time in which the engine was not to answer."""
        self._open = {request: (now, answered) for request, (_, answered) in self._open.items()}

    def pace(self, now: float) -> Pace | None:
        """The medians; None where there is too little to say."""
        while self._last and now - self._last[0][0] > WINDOW_S:
            self._last.popleft()
        waits, per_token = [wait_s for _, wait_s, _ in self._last], [token_s for _, _, token_s in self._last]
        usual_s = statistics.median(waits) if waits else 0.0
        # what an answer has not brought yet is taken to be what it usually brings
        tokens = max(usual_s / (statistics.median(per_token) or 1.0), 1.0) if waits else 1.0
        queued_count = not self._streams or not self._last
        for since, answered in self._open.values():
            if (answered or queued_count) and now - since > usual_s:
                waits.append(now - since)
                per_token.append((now - since) / tokens)
        if not waits or (len(waits) < MIN_ANSWERS and statistics.median(waits) < LONG_S):
            return None
        return Pace(len(waits), statistics.median(waits), statistics.median(per_token))


@dataclass(slots=True, kw_only=True)
class _Engine:
    peers: str
    heard: float
    pace: Pace
    slow_in_a_row: int = 0
    resting_until: float | None = None
    rest_s: float = REST_S
    tried: float = 0.0
    """When it last got work again."""


@dataclass(slots=True)
class Paces:
    """The pace of every engine against its peers. `times`: so many times as long is slow."""

    times: float
    _engines: dict[str, _Engine] = field(default_factory=dict)

    def heard(self, url: str, peers: str, pace: Pace, now: float) -> str | None:
        """Note the pace of an engine among `peers`; returns in words what it takes, if it is found to be
        slow now."""
        engine = self._engines.setdefault(url, _Engine(peers=peers, heard=now, pace=pace))
        engine.heard, engine.pace = now, pace
        if engine.resting_until is not None:
            return None
        others = [
            one.pace
            for name, one in self._engines.items()
            if name != url and one.peers == peers and one.resting_until is None and now - one.heard <= FRESH_S
        ]
        if not others or pace.wait_s < LEAST_WAIT_S:
            engine.slow_in_a_row = 0
            return None
        wait_s = statistics.median(other.wait_s for other in others)
        token_s = statistics.median(other.token_s for other in others)
        is_slow = pace.wait_s > self.times * wait_s and pace.token_s > self.times * token_s
        engine.slow_in_a_row = engine.slow_in_a_row + 1 if is_slow else 0
        if engine.slow_in_a_row < IN_A_ROW:
            return None
        self._rest(engine, now)
        return (
            f"{pace.token_s:.3g} s for each token where its peers take {token_s:.3g} s "
            f"({pace.wait_s:.3g} s for an answer, they {wait_s:.3g} s)"
        )

    def _rest(self, engine: _Engine, now: float) -> None:
        """Begin a rest, twice as long as the last one if the engine did well for less than that in between."""
        again = engine.tried > 0.0 and now - engine.tried < 2 * engine.rest_s
        engine.rest_s = min(2 * engine.rest_s, MAX_REST_S) if again else REST_S
        engine.resting_until = now + engine.rest_s
        engine.slow_in_a_row = 0

    @property
    def slow(self) -> list[str]:
        """The engines that rest."""
        return [url for url, engine in self._engines.items() if engine.resting_until is not None]

    def to_try(self, now: float) -> list[str]:
        """The engines that have rested long enough; they are to get work from now on."""
        found = [
            url for url, one in self._engines.items() if one.resting_until is not None and now >= one.resting_until
        ]
        for url in found:
            self._engines[url].resting_until, self._engines[url].tried = None, now
        return found

    def restarted(self, url: str, now: float) -> bool:
        """Try an engine at once that was started anew; returns whether it rested."""
        engine = self._engines.get(url)
        if engine is None or engine.resting_until is None:
            return False
        engine.resting_until, engine.tried = None, now
        return True
