"""Steps of whole groups that are filled while they run: a group is trained once all its responses have ended.

    step v opens -> part: groups of its batch that have ended -> ... -> last part: the last of them; v closes

`WholeSamples` waits for a batch and then trains it; here the learner has most of a batch's gradient when the last
response of it ends. Which samples a step takes, and so every age, is as before: docs/staleness.md.
"""

from __future__ import annotations

from itertools import groupby

from opd_async.scheduling.assembly import Assembler, Sample
from opd_async.scheduling.filled_steps import PARTS
from opd_async.scheduling.step_policy import Round


class FilledSamples:
    """Step v trains every sample below (v + 1) * `samples_per_step` that no step before it has trained.

    These are `samples_per_step`, in whole groups of `group_size`. After a run that was stopped in the middle of a step
    they are what that step had left, too.
    """

    def __init__(self, samples_per_step: int, group_size: int) -> None:
        self.samples_per_step = samples_per_step
        self.group_size = group_size

    def _batch(self, assembler: Assembler, version: int) -> list[int]:
        """Samples of the step at `version` that are not trained yet."""
        ids: list[int] = []
        sample_id = assembler.completed.first_absent(0)
        while sample_id < (version + 1) * self.samples_per_step:
            ids.append(sample_id)
            sample_id = assembler.completed.first_absent(sample_id + 1)
        return ids

    def _groups(self, assembler: Assembler, batch: list[int]) -> list[list[list[Sample]]]:
        """Groups of which every response has ended and is scored, in order; each response with the further ones of its
        episode."""
        groups: list[list[list[Sample]]] = []
        for _, ids in groupby(batch, key=lambda sample_id: sample_id // self.group_size):
            found = [assembler.episode_of(sample_id) for sample_id in ids]
            ended = [episode for episode in found if episode is not None]
            if len(ended) == len(found):
                groups.append(ended)
        return groups

    def ready_tokens(self, assembler: Assembler, version: int) -> int:
        """Tokens of the groups that the step at `version` could train."""
        groups = self._groups(assembler, self._batch(assembler, version))
        return sum(sample.untrained_tokens for group in groups for episode in group for sample in episode)

    def overfull(self, assembler: Assembler, version: int, taken: int | None) -> bool:
        """Never: admission is enough."""
        return False

    def round(self, assembler: Assembler, version: int, taken: int) -> Round:
        """A sixteenth of a step of ended groups, or one group; the step closes with the last group of its batch."""
        batch, chosen = self._batch(assembler, version), list[list[Sample]]()
        for group in self._groups(assembler, batch):
            if len(chosen) * PARTS >= self.samples_per_step:
                break
            chosen += group
        return Round([sample for episode in chosen for sample in episode], closes=len(chosen) == len(batch))
