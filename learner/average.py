"""A student that is taught by an average of itself: exponential over the steps, in the learner's ranks.

    step: student w -> average a <- decay a + (1 - decay) w        a teaches in the next step

The average is kept in float32, whatever the weights are: in bfloat16 a step of 1 - decay would be lost. A checkpoint
has it under names behind `average.`, in float32, and a resumed run goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opd_async.learner.config import LearnerConfig, TeacherConfig
from opd_async.learner.model.decoder import DecoderModel
from opd_async.learner.teacher import Teacher

PREFIX = "average."
"""Before the names of the average's parameters in a checkpoint."""


class MovingTeacher(Teacher):
    """An average of the student's weights that teaches."""

    def __init__(self, config: LearnerConfig, teacher: TeacherConfig, vocab: int) -> None:
        """Begin with the weights that the student begins with. Raises as `Teacher`."""
        super().__init__(config, teacher, vocab)
        self._decay = teacher.decay
        # the weights themselves where they are float32 already
        self._average = [parameter.data.float() for parameter in self.model.parameters()]

    @torch.no_grad()
    def follow(self, student: DecoderModel) -> None:
        """Take the student's weights after a step into the average."""
        pairs = zip(self.model.parameters(), self._average, student.parameters(), strict=True)
        for parameter, average, new in pairs:
            average.lerp_(new.data.to(average.device, torch.float32), 1.0 - self._decay)
            self._round(parameter, average)

    @contextmanager
    def in_float32(self) -> Iterator[DecoderModel]:
        """The model with the average itself for weights, for a checkpoint; what is loaded into it meanwhile stays."""
        kept = [parameter.data for parameter in self.model.parameters()]
        for parameter, average in zip(self.model.parameters(), self._average, strict=True):
            parameter.data = average
        try:
            yield self.model
        finally:
            for parameter, average, weights in zip(self.model.parameters(), self._average, kept, strict=True):
                parameter.data = weights
                self._round(parameter, average)

    @staticmethod
    def _round(parameter: torch.nn.Parameter, average: torch.Tensor) -> None:
        if parameter.data.data_ptr() != average.data_ptr():
            parameter.data.copy_(average)
