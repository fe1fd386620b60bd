"""A response of several turns while it is generated: each turn ends by itself, the response when its episode says so.

A new attempt begins the episode anew. What an earlier one has left, the lease's prefix, is *replayed*: turns are taken
from it as long as they last, and what is given must be what was given then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.client.replies import Delta
from opd_async.actors.rollout.generation import Generation
from opd_async.config.topology import RolloutSection
from opd_async.errors import OpdError
from opd_async.transport import messages as m


class DivergedError(OpdError):
    """An episode that was begun anew is not the one of which tokens are held: it gave others, or ended before them."""


@dataclass(frozen=True, slots=True)
class Stops:
    """Texts that end a turn, and how tokens become text."""

    texts: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] = lambda ids: ""

    def cut(self, before: NDArray[np.int32], ids: NDArray[np.int32]) -> int | None:
        """How many of the new `ids` int32[n] a turn has that said `before` int32[k]: up to the token that completes one
        of the texts; None if none does."""
        if not self.texts:
            return None
        # no token of a text is shorter than a byte
        reach = max(len(text.encode()) for text in self.texts) + 4
        window = before[-reach:].tolist()
        for count, token in enumerate(ids.tolist(), start=1):
            window.append(token)
            text = self.decode(window[-reach:])
            if any(stop in text for stop in self.texts):
                return count
        return None


@dataclass(slots=True, kw_only=True)
class EpisodeGeneration(Generation):
    """The state of one lease that an episode fills."""

    turn_finish: m.Finish | None = None
    """How the last turn ended; None while one is generated."""
    turn_start: int = 0
    """Position of the turn's first token."""
    turn_limit: int = 0
    """Position at which the turn ends at the latest."""
    stops: Stops = field(default_factory=Stops)
    replayed: int = 0
    """Tokens of the prefix that the episode has gone through again."""
    heard: Callable[[], None] | None = None
    """Called when tokens of the turn have arrived."""

    @property
    def position(self) -> int:
        """Tokens of the response that the episode has seen."""
        return self.replayed if self.replayed < len(self.lease.prefix) else self.length

    @property
    def ended(self) -> bool:
        """Whether the turn has ended."""
        return self.turn_finish is not None

    def turn(self) -> NDArray[np.int32]:
        """int32[n]: the tokens of the turn so far."""
        return self.response()[self.turn_start : self.position]

    def begin_turn(self, limit: int, stops: Stops, stop_token_ids: tuple[int, ...]) -> None:
        """Begin a turn that ends at position `limit` at the latest; it may end within what is replayed."""
        self.new_request()
        self.turn_start, self.turn_limit, self.turn_finish, self.stops = self.position, limit, None, stops
        held = self.lease.prefix[self.replayed : limit]
        if not len(held):
            return
        ends = [index + 1 for index, token in enumerate(held.tolist()) if token in stop_token_ids][:1]
        if (cut := stops.cut(held[:0], held)) is not None:
            ends.append(cut)
        self.replayed += min(ends, default=len(held))
        if ends:
            self.turn_finish = m.Finish.STOP
        elif self.replayed >= limit:
            self.turn_finish = m.Finish.LENGTH

    def replay_given(self, token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Go through given tokens again; returns those of int32[n] that are new. Raises `DivergedError` for others
        than those that are held."""
        held = self.lease.prefix[self.replayed : self.replayed + len(token_ids)]
        if not np.array_equal(held, token_ids[: len(held)]):
            raise DivergedError(
                f"the episode was begun anew after its actor was lost, and gave something else at token {self.position}"
            )
        self.replayed += len(held)
        self.given_tokens += len(held)
        return token_ids[len(held) :]

    def require_all_replayed(self) -> None:
        """Raise `DivergedError` for an episode that ended before it came to the end of what is held."""
        held = len(self.lease.prefix)
        if self.replayed < held:
            raise DivergedError(
                f"the episode was begun anew after its actor was lost, and ended at token {self.replayed} of {held} "
                "that are held"
            )

    def settle(self, max_tokens: int, stop_token_ids: tuple[int, ...]) -> bool:
        """Note if the tokens at hand already end the turn."""
        tokens = self.turn()
        if len(tokens) and int(tokens[-1]) in stop_token_ids:
            self.turn_finish = m.Finish.STOP
        elif self.length >= max_tokens:
            self.turn_finish = m.Finish.LENGTH
        return self.ended

    def max_tokens(self, settings: RolloutSection) -> int:
        """Most tokens that the response may have at the end of the turn."""
        return self.turn_limit

    def take(self, delta: Delta, on_teacher: bool, stop_token_ids: tuple[int, ...]) -> int:
        """As for other responses, but what ends is the turn; tokens behind a text that ends it were never made."""
        kept = self.stops.cut(self.turn(), delta.token_ids) if self.stops.texts else None
        if kept is not None:
            delta = replace(delta, token_ids=delta.token_ids[:kept], logprobs=delta.logprobs[:kept])
        ended = m.Finish.STOP if kept is not None else delta.finish
        # not `super()`: a dataclass with slots is another class than the one that this function was compiled in
        count = Generation.take(self, replace(delta, finish=None), on_teacher, stop_token_ids)
        self.turn_finish = ended
        if ended is m.Finish.LENGTH:
            self.settle(self.turn_limit + 1, stop_token_ids)
        if kept is not None:
            self.new_request()  # no pause is to wait for what the stream has still to say
        if self.heard is not None:
            self.heard()
        return count
