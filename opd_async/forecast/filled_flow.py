"""Filled steps as a flow: parts of ended responses, cuts in the last one, as `FilledSteps` has it.

Admission is the real rule; a part begins when the one before it ended, between two ticks as well.
"""

from __future__ import annotations

import math

import numpy as np

from opd_async.forecast.flow import Ended, Flow
from opd_async.scheduling import admission
from opd_async.scheduling.filled_steps import FULL_NEXT_STEP, LARGEST_STEP, PARTS

Segments = list[tuple[int, int]]


class FilledFlow:
    """Steps of `tokens_per_step` with bound `staleness`; None: nothing is ever cut. 0: a full step drains."""

    def __init__(self, tokens_per_step: int, staleness: int | None) -> None:
        self._budget, self._staleness = tokens_per_step, staleness
        self._part = max(1, tokens_per_step // PARTS)
        self._admission = admission.FilledAdmission(tokens_per_step, staleness)
        self._taken = 0
        self._free_at = 0.0
        """When the learner became free, or was last seen without anything to do."""
        self._part_end = math.inf
        self._closing = False
        self._drains = False
        """Generation stands still until the weights that the open step makes are there."""
        self._settle_at: list[float] = []
        """Computed tokens from which on all tokens of the weights before version 1, 2, ... are scored."""
        self._began = 0.0
        self._busy_s = 0.0

    def _due(self, version: int) -> int:
        return -1 if self._staleness is None else version - self._staleness

    def _bound(self, flow: Flow, due: int) -> float:
        """Tokens that have to be trained by the step for which weights `due` are due."""
        running = (flow.sent - flow.trained)[flow.oldest <= due].sum()
        return float(running) + sum(one.end - one.start for one in flow.ended if one.oldest <= due)

    def _overfull(self, flow: Flow) -> bool:
        if self._staleness is None:
            return False
        room, due = 0 if self._closing else max(self._budget - self._taken, 0), self._due(flow.version + 1)
        grows = due >= flow.version or bool((flow.oldest <= due).any())
        return grows and self._bound(flow, due) - room >= FULL_NEXT_STEP * self._budget

    def stands(self, flow: Flow) -> bool:
        """The open step drains, or the next one is bound to be too large."""
        if self._drains:
            return True
        if not self._overfull(flow):
            return False
        self._admission.held()
        return True

    def admits(self, flow: Flow, generating: int, waiting: int) -> bool:
        """As `FilledAdmission`."""
        self._admission.opened(self._taken, self._part_end == math.inf)
        work = flow.work
        now = admission.Flow(
            sample_id=flow.leased,
            version=flow.version,
            waiting_tokens=waiting,
            generating=generating,
            slots=work.slots,
            mean_tokens=work.mean_tokens,
        )
        return self._admission.admits(now)

    def turn(self, flow: Flow) -> None:
        """Everything that the learner does up to `flow.now`."""
        while True:
            if self._part_end < math.inf:
                if self._part_end > flow.now:
                    return
                self._end(flow)
            if flow.now < flow.resume_at:
                return
            segments = self._round(flow)
            if segments is None:
                self._free_at = flow.now
                return
            seconds = flow.train(segments, first=not self._taken)
            self._taken += sum(end - start for start, end in segments)
            self._busy_s += seconds
            self._part_end = self._free_at + seconds

    def _end(self, flow: Flow) -> None:
        """A part is trained; the last one ends its step."""
        self._free_at, self._part_end = self._part_end, math.inf
        if not self._closing:
            return
        waited = 1 - self._busy_s / max(self._free_at - self._began, 1e-9)
        self._admission.closed(self._taken, waited)
        flow.update(self._free_at)
        self._settle_at.append(flow.queued)
        self._free_at = self._began = flow.resume_at
        self._taken, self._busy_s, self._closing, self._drains = 0, 0.0, False, False

    def _settled(self, flow: Flow, due: int) -> bool:
        """Whether every token of weights `due` or older is scored."""
        if due == flow.version:
            return flow.scored >= flow.queued
        return not 0 <= due < len(self._settle_at) or flow.scored >= self._settle_at[due]

    def _too_large(self, flow: Flow, due: int) -> bool:
        return (
            0 <= due < flow.version
            and self._settled(flow, due)
            and self._taken + self._bound(flow, due) >= LARGEST_STEP * self._budget
        )

    def _round(self, flow: Flow) -> Segments | None:
        """The next part, as `FilledSteps.round`; None if there is none yet."""
        due = self._due(flow.version)
        forced = flow.oldest <= due
        room = self._budget - self._taken - float((flow.sent - flow.trained)[forced].sum())
        if not self._too_large(flow, due) and (room > self._part or flow.scored_tokens < room):
            found = self._ended(flow, self._part) if room > self._part else []
            if not found and self._overfull(flow):
                found = self._early(flow, min(self._part, room))
            return found or None
        if due == flow.version:  # what is generating now has to be in this step
            self._drains = True
            flow.send(flow.position > flow.sent)
        if not self._settled(flow, due):
            return None
        self._closing = True
        return [*flow.cut(forced), *self._ended(flow, room, due)]

    def _ended(self, flow: Flow, room: float, due: int = -1) -> Segments:
        """Ended responses, oldest token first, until they have `room` tokens; and all that are due."""
        flow.ended.sort(key=lambda one: one.oldest)
        segments: Segments = []
        tokens, later = 0, list[Ended]()
        for one in flow.ended:
            if one.scored_at > flow.scored or (tokens >= room and one.oldest > due):
                later.append(one)
                continue
            segments.append((one.start, one.end))
            tokens += one.end - one.start
        flow.ended = later
        return segments

    def _early(self, flow: Flow, room: float) -> Segments:
        """Cut running responses before their time, oldest token first, until they have `room` tokens."""
        held = flow.sent - flow.trained
        running = np.nonzero(held > 0)[0]
        running = running[np.argsort(flow.oldest[running], kind="stable")]
        before = np.cumsum(held[running]) - held[running]
        return flow.cut(running[before < room])
