"""Ground truth of the staleness simulator: every token that was ever made, and what may be trained of it.

A token's id is its serial number, so that each trained token can be traced to the sample, position and weights it was
made for; logprobs are functions of ids, so that a swapped or shifted one shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opd_async.scheduling.further import is_further
from opd_async.scheduling.segments import Segment

PROMPT_IDS = 10_000_000


class BrokenInvariant(AssertionError):
    """Something was trained that must not be, or was not trained that must be."""


@dataclass(frozen=True, slots=True)
class Row:
    """What a step took of one sample; `segment` is None for an empty response."""

    sample_id: int
    end: int
    complete: bool
    segment: Segment | None
    given: int = 0
    """Tokens before `end` that were given."""
    episode: int | None = None
    """Of a further sample: the one that has begun it."""
    gone: bool = False
    """Its actor died, and nobody goes on with it."""


def prompt_of(sample_id: int) -> NDArray[np.int32]:
    """int32[1..3]: the sample's prompt."""
    return np.full(1 + sample_id % 3, PROMPT_IDS + sample_id % 1_000_003, np.int32)


def behaviour_of(ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """float32[n]: what the student says of its tokens."""
    return (-((ids.astype(np.int64) * 7919) % 1009) / 1009).astype(np.float32)


def teacher_of(previous: NDArray[np.int32], ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """float32[n]: what the teacher says of `ids` behind `previous`; wrong contexts give other values."""
    return (-((previous.astype(np.int64) * 31 + ids.astype(np.int64) * 17) % 997) / 997).astype(np.float32)


@dataclass(slots=True)
class Oracle:
    """Remembers what was made and checks each step against it."""

    max_staleness: int | None
    max_length: int
    seed: int = 0
    whole_groups: bool = False
    """Further samples are trained in the step of the one that has begun them."""
    spans: bool = False
    """Responses have tokens that were given and not sampled."""
    limit: int | None = None
    """Samples from this one on have one token, so that a run can come to its end."""
    made: list[tuple[int, int, int]] = field(default_factory=list)
    """(sample, position, version) by token id."""
    steps: list[tuple[int, list[Row]]] = field(default_factory=list)
    _ids: dict[int, NDArray[np.int32]] = field(default_factory=dict)
    """Trained response tokens by sample."""
    _complete: set[int] = field(default_factory=set)
    _open: bool = False
    """The newest step has not closed."""

    def length_of(self, sample_id: int) -> int:
        """Length of the whole response: mostly short, some empty, some as long as can be."""
        if self.limit is not None and sample_id >= self.limit and not is_further(sample_id):
            return 1
        draw = (sample_id * 2654435761 + self.seed * 40503) >> 7
        if draw % 7 == 0:
            return self.max_length
        return 0 if draw % 7 == 1 else draw % (self.max_length // 3)

    def given_until(self, sample_id: int, position: int) -> int:
        """End of the run of given tokens that begins at a position; the position itself where it is sampled."""
        turn = (sample_id + self.seed) % 5
        while self.spans and turn and position < self.length_of(sample_id) and (position // turn + sample_id) % 3 == 0:
            position += 1
        return position

    def given_before(self, sample_id: int, position: int) -> int:
        """How many tokens before a position are given ones."""
        return sum(self.given_until(sample_id, at) > at for at in range(position))

    def make(self, sample_id: int, position: int, version: int) -> int:
        """A new token; returns its id."""
        self.made.append((sample_id, position, version))
        return len(self.made) - 1

    def step(self, version: int, rows: Sequence[Row], *, closes: bool = True) -> None:
        """A part of the step at `version` trains `rows`; it is the last one if it `closes` the step."""
        if not self._open:
            if self.steps and version != self.steps[-1][0] + 1:
                raise BrokenInvariant(f"step {version} after step {self.steps[-1][0]}")
            self.steps.append((version, []))
        elif version != self.steps[-1][0]:
            raise BrokenInvariant(f"a part of step {version} while step {self.steps[-1][0]} is open")
        self.steps[-1][1].extend(rows)
        self._open = not closes
        for row in rows:
            self._train(version, row)
        here = {row.sample_id for row in rows}
        for row in rows if self.whole_groups else []:
            if row.episode is not None and row.episode not in here:
                raise BrokenInvariant(f"sample {row.sample_id} is trained without sample {row.episode}")

    def _train(self, version: int, row: Row) -> None:
        sample_id = row.sample_id
        before = self._ids.get(sample_id, np.zeros(0, np.int32))
        if sample_id in self._complete:
            raise BrokenInvariant(f"sample {sample_id} is trained after its end")
        if row.complete:
            self._complete.add(sample_id)
            if row.end != self.length_of(sample_id) and not row.gone:
                raise BrokenInvariant(f"sample {sample_id} ends at {row.end}, not at {self.length_of(sample_id)}")
        if row.segment is None:
            given = row.complete and self.given_until(sample_id, len(before)) == row.end
            if row.end != len(before) and not given:
                raise BrokenInvariant(f"sample {sample_id}: no segment, but it moves from {len(before)} to {row.end}")
            return
        new = self._check_segment(row.segment, before, row.end)
        self._check_age(version, row.segment, new)
        self._ids[sample_id] = np.concatenate([before, new])

    def _check_segment(self, segment: Segment, before: NDArray[np.int32], end: int) -> NDArray[np.int32]:
        """The segment continues what was trained, with its own prompt, ids and logprobs; returns its new ids."""
        prompt = prompt_of(segment.sample_id)
        new = segment.token_ids[segment.prompt_tokens + segment.start :]
        where = f"sample {segment.sample_id} [{segment.start}, {segment.end})"
        if (
            segment.start != len(before)
            or segment.end != end
            or len(new) != segment.end - segment.start
            or not len(new)
        ):
            raise BrokenInvariant(f"{where}: {len(before)} tokens were trained before, {len(new)} are new")
        if not np.array_equal(segment.token_ids[: len(prompt) + len(before)], np.concatenate([prompt, before])):
            raise BrokenInvariant(f"{where}: its context is not what was trained")
        expected = [p for p in range(segment.start, end) if self.given_until(segment.sample_id, p) == p]
        positions = np.arange(segment.start, end) if segment.positions is None else segment.positions
        if positions.tolist() != expected:
            raise BrokenInvariant(f"{where}: positions {positions.tolist()} are trained, {expected} were sampled")
        trained = positions - segment.start
        if not np.array_equal(segment.behaviour_logprobs, behaviour_of(new)[trained]):
            raise BrokenInvariant(f"{where}: behaviour logprobs of other tokens")
        previous = segment.token_ids[segment.prompt_tokens + segment.start - 1 : -1]
        if not np.array_equal(segment.teacher_logprobs, teacher_of(previous, new)[trained]):
            raise BrokenInvariant(f"{where}: teacher logprobs of other tokens")
        return new

    def _check_age(self, version: int, segment: Segment, new: NDArray[np.int32]) -> None:
        is_sampled = np.full(len(new), segment.positions is None)
        if segment.positions is not None:
            is_sampled[segment.positions - segment.start] = True
        versions = iter(segment.versions.tolist())
        for offset, token in enumerate(new.tolist()):
            sample_id, position, made_by = self.made[token]
            where = f"sample {segment.sample_id} position {segment.start + offset}"
            if (sample_id, position) != (segment.sample_id, segment.start + offset):
                raise BrokenInvariant(f"{where}: holds a token of sample {sample_id} position {position}")
            if not is_sampled[offset]:
                continue
            if (label := next(versions)) != made_by:
                raise BrokenInvariant(f"{where}: labelled {label}, made by weights {made_by}")
            if version < made_by:
                raise BrokenInvariant(f"{where}: made by weights {made_by}, trained at {version}: too new")
            if self.max_staleness is not None and version - made_by > self.max_staleness:
                raise BrokenInvariant(f"{where}: made by weights {made_by}, trained at {version}: too old")

    def forget(self, version: int) -> None:
        """The learner went back to `version`: later steps never happened."""
        kept = [(at, rows) for at, rows in self.steps if at < version]
        self.steps, self._ids, self._complete, self._open = [], {}, set(), False
        for at, rows in kept:
            self.step(at, rows)

    def check_all(self, samples: int) -> None:
        """At the end: each of the first `samples` responses has been trained to its last token."""
        missing = sorted(set(range(samples)) - self._complete)
        if missing:
            raise BrokenInvariant(f"samples {missing} were never trained to their end")
