"""Chunks that a rollout actor has made and the intake has not acknowledged: nothing is lost while they are here.

Pure: the clock is a parameter. A chunk is sent with context when its teacher actor cannot know the earlier tokens: the
first chunk of an attempt, the first after a teacher was restarted, the first of a resend.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opd_async.transport.messages import Chunk
from opd_async.transport.owed import OwedSample


@dataclass(slots=True, kw_only=True)
class _Entry:
    """Everything kept of one sample until its last chunk is acknowledged."""

    attempt: int
    route: int
    """Index of the teacher actor that scores it; 0 where none does."""
    prompt: NDArray[np.int32]
    teacher_prompt: NDArray[np.int32] | None
    """What the teacher reads in place of it."""
    contrast_prompt: NDArray[np.int32] | None
    """What it reads beside that."""
    tokens: list[NDArray[np.int32]]
    """Response so far, the prefix of an earlier attempt included."""
    end: int
    chunks: list[Chunk] = field(default_factory=list)
    sent_at: float = 0.0
    needs_context: bool = True
    finished: bool = False


class Outbox:
    """All samples of one rollout actor that are being generated or wait for acknowledgement."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def open(
        self,
        sample_id: int,
        attempt: int,
        route: int,
        prompt: NDArray[np.int32],
        prefix: NDArray[np.int32],
        teacher_prompt: NDArray[np.int32] | None = None,
        contrast_prompt: NDArray[np.int32] | None = None,
    ) -> None:
        """A lease begins; `prefix` holds response tokens that are scored already."""
        self._entries[sample_id] = _Entry(
            attempt=attempt,
            route=route,
            prompt=prompt,
            teacher_prompt=teacher_prompt,
            contrast_prompt=contrast_prompt,
            tokens=[prefix],
            end=len(prefix),
        )

    def add(self, chunk: Chunk, now: float) -> Chunk:
        """Keep `chunk` until it is acknowledged; returns what to send, with context where that is needed."""
        entry = self._entries[chunk.sample_id]
        outgoing = self._with_context(entry, chunk) if entry.needs_context else chunk
        entry.needs_context = False
        entry.tokens.append(chunk.token_ids)
        entry.end = chunk.end
        entry.finished = chunk.finish is not None
        if not entry.chunks:
            entry.sent_at = now
        entry.chunks.append(chunk)
        return outgoing

    def acknowledge(self, sample_id: int, attempt: int, end: int, now: float) -> None:
        """The intake holds everything up to `end` (see `Acks`)."""
        entry = self._entries.get(sample_id)
        if entry is None or entry.attempt != attempt:
            return
        kept = [chunk for chunk in entry.chunks if chunk.acknowledged_at > end]
        if len(kept) < len(entry.chunks):
            entry.sent_at = now
        entry.chunks = kept
        if entry.finished and not kept:
            del self._entries[sample_id]

    def overdue(self, now: float, after_s: float) -> list[tuple[int, Chunk]]:
        """(route, chunk) to send again: unacknowledged, and no progress on their sample for `after_s`."""
        late = [entry for entry in self._entries.values() if entry.chunks and now - entry.sent_at >= after_s]
        return [pair for entry in late for pair in self._again(entry, now)]

    def teacher_restarted(self, route: int, now: float) -> list[tuple[int, Chunk]]:
        """(route, chunk) to send again because the teacher actor there has lost what it held."""
        entries = [entry for entry in self._entries.values() if entry.route == route]
        for entry in entries:
            entry.needs_context = True
        return [pair for entry in entries if entry.chunks for pair in self._again(entry, now)]

    def _again(self, entry: _Entry, now: float) -> list[tuple[int, Chunk]]:
        entry.sent_at = now
        entry.needs_context = False
        first, *rest = entry.chunks
        return [(entry.route, self._with_context(entry, first)), *((entry.route, chunk) for chunk in rest)]

    @staticmethod
    def _with_context(entry: _Entry, chunk: Chunk) -> Chunk:
        response = np.concatenate(entry.tokens)[: chunk.start]
        context = np.concatenate([entry.prompt, response]).astype(np.int32)
        return dataclasses.replace(
            chunk, context=context, teacher_prompt=entry.teacher_prompt, contrast_prompt=entry.contrast_prompt
        )

    def route_of(self, sample_id: int) -> int:
        """Where all chunks of this sample go."""
        return self._entries[sample_id].route

    def owed(self) -> list[OwedSample]:
        """The tokens that exist of every sample here."""
        return [OwedSample(sample_id, entry.attempt, entry.end) for sample_id, entry in self._entries.items()]

    def clear(self) -> None:
        """Forget every sample."""
        self._entries.clear()

    @property
    def unacknowledged(self) -> int:
        """Chunks that wait for acknowledgement."""
        return sum(len(entry.chunks) for entry in self._entries.values())
