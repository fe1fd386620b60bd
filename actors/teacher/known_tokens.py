"""What a teacher actor knows of unfinished samples: all their tokens so far, and which of them were given. Pure.

A request to an engine carries all ids so far; only a sample's first chunk brings its beginning along.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opd_async.actors.teacher.lane import Request
from opd_async.actors.teacher.live_weights import LiveWeights
from opd_async.scheduling.score_batches import ScoreItem
from opd_async.transport.messages import Chunk


@dataclass(slots=True, kw_only=True)
class _Known:
    attempt: int
    ids: NDArray[np.int32]
    """Prompt, as the teacher reads it, and response so far."""
    contrast: NDArray[np.int32] | None = None
    """What it reads beside that prompt, in front of the same response; None: nothing."""
    given: dict[int, int] = field(default_factory=dict)
    """Where each run of given tokens begins, by its end."""
    sent_end: int = 0
    """Response tokens that the intake was sent."""
    salt: str = ""
    """Whose keys and values its last request could use, where that matters."""
    cached_under: str = ""
    """The same of the last request that was answered."""
    held: list[Chunk] = field(default_factory=list)
    """Given tokens behind others that are still to be scored."""


class KnownTokens:
    """The unfinished samples of one teacher actor."""

    def __init__(self) -> None:
        self._samples: dict[int, _Known] = {}

    def extend(self, chunk: Chunk) -> bool:
        """Add a chunk's tokens; False, and nothing is changed, if what stands before them is not known."""
        known = self._samples.get(chunk.sample_id)
        if chunk.context is not None:
            prefix = chunk.context
            if chunk.teacher_prompt is not None:  # the same response behind another prompt
                prefix = np.concatenate([chunk.teacher_prompt, chunk.context[chunk.prompt_tokens :]])
            known = self._samples[chunk.sample_id] = _Known(
                attempt=chunk.attempt, ids=prefix, contrast=chunk.contrast_prompt, sent_end=chunk.start
            )
        elif (
            known is None
            or known.attempt != chunk.attempt
            or len(known.ids) != chunk.scored_prompt_tokens + chunk.start
            or (0 if known.contrast is None else len(known.contrast)) != chunk.contrast_prompt_tokens
        ):
            return False
        known.ids = np.concatenate([known.ids, chunk.token_ids])
        if not chunk.sampled:
            known.given[chunk.end] = known.given.get(chunk.start, chunk.start)
        return True

    def requests(self, item: ScoreItem) -> list[Request]:
        """All ids up to the item's end, and where the first to score stands, behind each prompt that the teacher reads;
        none for a sample that has ended."""
        first, last = item.chunks[0], item.chunks[-1]
        known = self._samples.get(item.sample_id)
        if known is None:
            return []
        read = last.scored_prompt_tokens
        found = [(known.ids[: read + last.end], read + first.start)]
        if known.contrast is not None:
            ids = np.concatenate([known.contrast, known.ids[read : read + last.end]])
            found.append((ids, len(known.contrast) + first.start))
        return found

    def salt(self, item: ScoreItem, live: LiveWeights, mixed: int) -> str:
        """Whose keys and values the request of an item may use now, of an engine as `LiveWeights.salt` says."""
        known = self._samples.get(item.sample_id)
        if known is None:
            return live.salt("", mixed)
        known.salt = live.salt(known.salt, mixed)
        return known.salt

    def given(self, chunk: Chunk) -> list[Chunk]:
        """What is to be sent now of given tokens that were just added: they keep their place behind what is scored.

        The intake knows a sample by its first tokens: what came before them would be of an unknown one.
        """
        self._samples[chunk.sample_id].held.append(chunk)
        return self._due(self._samples[chunk.sample_id])

    def sent(self, chunk: Chunk) -> list[Chunk]:
        """Note that a chunk was sent with its scores; returns the given ones that follow it."""
        known = self._samples.get(chunk.sample_id)
        if known is None or known.attempt != chunk.attempt:
            return []
        known.sent_end = max(known.sent_end, chunk.end)
        known.cached_under = known.salt
        return self._due(known)

    @staticmethod
    def _due(known: _Known) -> list[Chunk]:
        due: list[Chunk] = []
        while known.held and known.held[0].start <= known.sent_end:
            due.append(known.held.pop(0))
            known.sent_end = max(known.sent_end, due[-1].end)
        return due

    def scored_before(self, item: ScoreItem) -> list[int]:
        """Tokens that engines were sent when what is before the item was scored, behind each prompt; 0 for the
        beginning of a response.

        They end with the last sampled token before it: given tokens directly in front of the item are new to them.
        """
        first, known = item.chunks[0], self._samples.get(item.sample_id)
        if known is not None and known.salt != known.cached_under:
            return [0 for _ in first.read_prompts]
        start = first.start if known is None else known.given.get(first.start, first.start)
        return [prompt + start - 1 if start else 0 for prompt in first.read_prompts]

    def holds(self, chunk: Chunk) -> bool:
        """Whether a chunk is of the attempt that is known, and was added."""
        known = self._samples.get(chunk.sample_id)
        end = chunk.scored_prompt_tokens + chunk.end
        return known is not None and known.attempt == chunk.attempt and len(known.ids) >= end

    def forget(self, sample_id: int) -> None:
        """Drop a sample."""
        self._samples.pop(sample_id, None)

    def clear(self) -> None:
        """Drop every sample."""
        self._samples.clear()
