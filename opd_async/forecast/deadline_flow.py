"""Deadline cuts as a flow: each step is planned as a whole, as `DeadlineCuts` and `DeadlineAdmission` do it."""

from __future__ import annotations

import math

from opd_async.forecast.flow import Ended, Flow
from opd_async.scheduling.admission import FULL_STEP, FULL_STEP_AT_S1, close_early_tokens
from opd_async.scheduling.step_policy import LARGEST_STEP


class DeadlineSteps:
    """Steps with bound `staleness` >= 1."""

    def __init__(self, tokens_per_step: int, staleness: int) -> None:
        self._budget, self._staleness = tokens_per_step, staleness
        self._step_end = math.inf
        self._settle_at = 0.0
        """Computed tokens from which on the next step may begin."""
        self._next_ready = 0.0
        """While a step is trained: what the next one could take of whole chunks."""

    @property
    def _training(self) -> bool:
        return self._step_end < math.inf

    def stands(self, flow: Flow) -> bool:
        """The next step is far too large already."""
        due = flow.version + self._training - self._staleness
        self._next_ready = self._ready(flow, due, flow.work.chunk_tokens)
        return self._training and self._next_ready >= close_early_tokens(self._budget, self._staleness)

    def admits(self, flow: Flow, generating: int, waiting: int) -> bool:
        """As `DeadlineAdmission`."""
        limit = FULL_STEP_AT_S1 if self._staleness == 1 else FULL_STEP
        if self._training and self._next_ready >= limit * self._budget:
            return False
        return waiting < self._staleness * self._budget

    def turn(self, flow: Flow) -> None:
        """End a step, or begin one."""
        if flow.now >= self._step_end:
            self._step_end = math.inf
            flow.update(flow.now)
            if self._staleness == 1:
                self._settle_at = flow.queued
        elif not self._training and flow.now >= flow.resume_at and flow.scored >= self._settle_at:
            due = flow.version - self._staleness
            if self._ready(flow, due) >= self._budget:
                self._step_end = flow.now + flow.train(self._chosen(flow, due), first=True)

    def _ready(self, flow: Flow, due: int, chunk: int = 1) -> float:
        """What a step could take; of running responses only whole chunks have left the engine."""
        chunk = 1 if flow.coarse else chunk
        forced = ((flow.sent - flow.trained)[flow.oldest <= due] // chunk).sum() * chunk
        return flow.scored_tokens + float(forced)

    def _chosen(self, flow: Flow, due: int) -> list[tuple[int, int]]:
        """What is forced and what has ended, as `DeadlineCuts.choose` has it."""
        segments = flow.cut(flow.oldest <= due)
        flow.ended.sort(key=lambda one: one.oldest)
        tokens = sum(end - start for start, end in segments)
        later: list[Ended] = []
        for one in flow.ended:
            full = tokens >= LARGEST_STEP * self._budget
            if one.scored_at > flow.scored or (full and one.oldest > due):
                later.append(one)
                continue
            segments.append((one.start, one.end))
            tokens += one.end - one.start
        flow.ended = later
        return segments
