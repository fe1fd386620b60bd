"""What the dispatcher has still to be told of the samples that are held, and of the open step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from opd_async.scheduling.assembly import Assembler, Sample


class Unacknowledged:
    """Samples of which more is held than was acknowledged, and whether the learner ran out of work since. Pure."""

    def __init__(self) -> None:
        self._samples: set[int] = set()
        self._ended: dict[int, tuple[int, int, int]] = {}
        """(attempt, actor, end) of complete samples that a step took before their end was acknowledged."""
        self._step_changed = False

    def more_of(self, sample_id: int) -> None:
        """Note that more of a sample is held."""
        self._samples.add(sample_id)

    def before_end(self, sample: Sample) -> None:
        """Note that a step takes a complete sample, which is about to be forgotten."""
        self._ended[sample.sample_id] = (sample.attempt, sample.actor, sample.scored_end + 1)
        self._samples.add(sample.sample_id)

    def step_changed(self) -> None:
        """Note that the learner waits for more of the open step.

        Admission has to know it even while no chunk comes: where no response is under way, none comes before admission
        lets one begin.
        """
        self._step_changed = True

    def rows(self, assembler: Assembler) -> NDArray[np.int64] | None:
        """int64[n, 4]: sample, attempt, actor, end of what is new since the last call; None if nothing is."""
        if not self._samples and not self._step_changed:
            return None
        rows = [self._held(assembler, sample_id) for sample_id in self._samples]
        self._samples.clear()
        self._step_changed = False
        return np.array([row for row in rows if row is not None], np.int64).reshape(-1, 4)

    def _held(self, assembler: Assembler, sample_id: int) -> tuple[int, int, int, int] | None:
        sample = assembler.samples.get(sample_id)
        if sample is None:
            ended = self._ended.pop(sample_id, None)
            return (sample_id, *ended) if ended is not None else None
        return sample_id, sample.attempt, sample.actor, sample.scored_end + (sample.finish is not None)
