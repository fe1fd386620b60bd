"""A student engine that decodes many tokens per event.

    start -> [prefill] -> decode ... -> chunk, chunk, ... -> end of the response, or of a turn, behind which it is
                            ^ pause (flushes) / resume       started again

All running responses gain one token per decode step, so that one number, the steps made so far, says where each of them
is. An event is the next end of a chunk or of a response; what lies between has a closed form (`DecodeCost`).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from opd_async.bench.sim.clock import Clock
from opd_async.bench.sim.tools import Call
from opd_async.forecast.cost_model import DecodeCost, PrefillCost

EPSILON = 1e-6


@dataclass(slots=True, kw_only=True)
class Generation:
    """A response on its way: `origin` is the engine's step count at its position 0."""

    sample_id: int
    prompt_id: int
    length: int
    origin: float = 0.0
    flushed: int = 0
    """Tokens that have left as chunks."""
    boundary: float = 0.0
    calls: list[Call] = field(default_factory=list)
    """Tools that it has still to call, in order."""

    @property
    def turn_end(self) -> int:
        """Tokens that it has when it leaves its engine the next time."""
        return self.calls[0].at if self.calls else self.length


Emit = Callable[[Generation, int, bool], None]
"""(response, end of the chunk that begins at `flushed`, whether the response ends there)."""


class StudentEngine:
    """One engine. `emit` is told of every chunk; it may start further responses."""

    def __init__(self, clock: Clock, decode: DecodeCost, prefill: PrefillCost, prompt: int, chunk: int) -> None:
        self._clock = clock
        self._decode = decode
        self._prompt_s = prefill.tokens_s(0, prompt)
        self._prompt = prompt
        self._chunk = chunk
        self.running: dict[int, Generation] = {}
        self.emit: Emit = lambda generation, end, ended: None
        self.away: Callable[[Generation, Call], None] = lambda generation, call: None
        """Told of a response that has left the engine for a tool."""
        self._order = itertools.count()
        self._boundaries: list[tuple[float, int, Generation]] = []
        self._steps = 0.0
        self._kv = 0.0
        self._at = 0.0
        self._prefill_s = 0.0
        self._epoch = 0
        self.paused = False
        self.busy_s = 0.0

    @property
    def load(self) -> int:
        """Responses being generated."""
        return len(self.running)

    def start(self, generation: Generation) -> None:
        """Begin a response, or its next turn; everything else on this engine waits for the prefill of a prompt."""
        self._advance()
        self._prefill_s += self._prompt_s * (not generation.flushed)
        generation.origin = self._steps - generation.flushed
        self._kv += self._prompt + generation.flushed
        self.running[generation.sample_id] = generation
        self._aim(generation)
        self._plan()

    def drop(self, sample_id: int) -> int:
        """Throw a running response away; returns how many tokens it had."""
        self._advance()
        generation = self.running.pop(sample_id)
        position = self.position(generation)
        self._kv -= self._prompt + position
        generation.boundary = -1.0
        self._plan()
        return position

    def pause(self) -> None:
        """Stop, and let all that was made leave as chunks."""
        self._advance()
        self.paused = True
        self._epoch += 1
        for generation in list(self.running.values()):
            end = self.position(generation)
            if end > generation.flushed:
                self._leave(generation, end, ended=False)

    def resume(self) -> None:
        """Go on."""
        self._at = self._clock.now
        self.paused = False
        self._plan()

    def position(self, generation: Generation) -> int:
        """Tokens of a response so far; the last one of a turn is not counted before the turn has ended."""
        return min(int(self._steps - generation.origin + EPSILON), generation.turn_end - 1)

    def _aim(self, generation: Generation) -> None:
        generation.boundary = generation.origin + min(generation.flushed + self._chunk, generation.turn_end)
        heapq.heappush(self._boundaries, (generation.boundary, next(self._order), generation))

    def _advance(self) -> None:
        elapsed, self._at = self._clock.now - self._at, self._clock.now
        if self.paused or not self.running:
            return
        self.busy_s += elapsed
        prefill = min(elapsed, self._prefill_s)
        self._prefill_s -= prefill
        active = len(self.running)
        steps = self._decode.steps(elapsed - prefill, active, self._kv)
        self._steps += steps
        self._kv += steps * active

    def _plan(self) -> None:
        """Ask for the next event; earlier requests are void."""
        self._epoch += 1
        while self._boundaries and self._boundaries[0][2].boundary != self._boundaries[0][0]:
            heapq.heappop(self._boundaries)
        if self.paused or not self.running:
            return
        target, epoch = self._boundaries[0][0], self._epoch
        steps = max(target - self._steps, 0.0)
        seconds = self._prefill_s + self._decode.seconds(steps, len(self.running), self._kv)
        self._clock.after(seconds, lambda: self._reach(target, epoch))

    def _reach(self, target: float, epoch: int) -> None:
        if epoch != self._epoch:
            return
        self._advance()
        self._steps = max(self._steps, target)
        while self._boundaries and self._boundaries[0][0] <= target + EPSILON:
            boundary, _, generation = heapq.heappop(self._boundaries)
            if generation.boundary == boundary:
                end = round(boundary - generation.origin)
                self._leave(generation, end, end >= generation.length)
        self._plan()

    def _leave(self, generation: Generation, end: int, ended: bool) -> None:
        turn_ended = end >= generation.turn_end
        if turn_ended:
            del self.running[generation.sample_id]
            self._kv -= self._prompt + end
            generation.boundary = -1.0
        self.emit(generation, end, ended)
        generation.flushed = end
        if not turn_ended:
            self._aim(generation)
        elif not ended:
            self.away(generation, generation.calls.pop(0))
