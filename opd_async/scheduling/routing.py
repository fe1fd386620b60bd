"""Who scores a prompt: prompts are dealt to replicas by load, and what is under way stays where it is. Pure.

A step waits for the slowest of all teachers, so that none may have more than its share: a hash of the prompt would give
one of many teachers half as much again. All samples of a prompt that are under way together, and all chunks and
attempts of a sample, meet the same teacher's prefix cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(slots=True)
class _Dealt:
    """A prompt with samples under way: where they are scored, and how many there are."""

    replica: int
    samples: int = 0


@dataclass(slots=True)
class _Sample:
    replica: int
    prompt: int
    counts: bool = True
    """Its response has not ended."""


class Deal:
    """Which of several replicas scores which prompt.

        of(sample) --> load of its replica --> ended(sample) --> only its prompt's place --> forget(sample)

    A replica that cannot be used any more loses its own prompts to the others, and no other prompt moves.
    """

    def __init__(self) -> None:
        self._load: Counter[int] = Counter()
        self._samples: dict[int, _Sample] = {}
        self._prompts: dict[int, _Dealt] = {}

    def of(self, sample_id: int, prompt: int, replicas: Collection[int]) -> int:
        """The one of `replicas` for a sample: its prompt's, if that has one among them, else the one with the fewest
        samples whose responses have not ended; of several, that with the lowest number."""
        sample, dealt = self._samples.get(sample_id), self._prompts.get(prompt)
        if dealt is None:
            dealt = self._prompts[prompt] = _Dealt(self._least(replicas))
        elif dealt.replica not in replicas:
            dealt.replica = self._least(replicas)
        if sample is None:
            self._samples[sample_id] = _Sample(dealt.replica, prompt)
            dealt.samples += 1
        else:  # a chunk or an attempt of it after the first
            self._load[sample.replica] -= sample.counts
            sample.replica, sample.counts = dealt.replica, True
        self._load[dealt.replica] += 1
        return dealt.replica

    def _least(self, replicas: Collection[int]) -> int:
        return min(replicas, key=lambda replica: (self._load[replica], replica))

    def ended(self, sample_id: int) -> None:
        """A sample's response has ended: it is no load to speak of, but its last chunks may come again."""
        sample = self._samples.get(sample_id)
        if sample is not None and sample.counts:
            sample.counts = False
            self._load[sample.replica] -= 1

    def forget(self, sample_id: int) -> None:
        """Nothing more will come of a sample."""
        self.ended(sample_id)
        sample = self._samples.pop(sample_id, None)
        if sample is None:
            return
        dealt = self._prompts[sample.prompt]
        dealt.samples -= 1
        if not dealt.samples:
            del self._prompts[sample.prompt]

    def clear(self) -> None:
        """Forget every sample."""
        self._load.clear()
        self._samples.clear()
        self._prompts.clear()
