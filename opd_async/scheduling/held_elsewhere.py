"""What one intake tells another of the chunks that it holds: everything that decides a step, without the tokens. Pure.

    other intake: Assembler.on_held -> HeldNews -> Held -> chunks_of -> Assembler.put: first intake

The first intake's assembler then holds the same samples, with zeros for their tokens. Logprobs are a chunk's mean, so
that sums over a step come out as they are; zeros among them stay zeros, since those are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd_async.scheduling.assembly import Sample
from opd_async.scheduling.held_chunk import HeldChunk
from opd_async.transport.kinds import Finish
from opd_async.transport.messages import Held, ScoredChunk

_FINISHES: tuple[str, ...] = tuple(Finish)
_COLUMNS = (
    *("sample_ids", "prompt_ids", "episodes"),
    *("attempts", "actors", "prompt_lengths", "starts", "lengths", "token_versions", "given_chunks", "counted"),
    *("teacher_prompt_lengths", "contrast_prompt_lengths", "finishes", "scorers", "further_counts", "turn_counts"),
)
_WIDE = 3
"""Of these columns, so many are int64; the rest is int32."""
_ZEROS = np.zeros(1 << 18, np.int32)
_ZEROS.flags.writeable = False


class HeldNews:
    """What an intake holds and has not told the first one yet."""

    def __init__(self, teachers: Sequence[str]) -> None:
        """`teachers` are the names of the plan's."""
        self._scorers = {name: index for index, name in enumerate(teachers)}
        self._several = len(teachers) > 1
        self._begin()

    def _begin(self) -> None:
        self._again: list[int] = []
        self._numbers: list[tuple[int, ...]] = []
        self._reals: list[tuple[float, float, float]] = []
        self._further: list[NDArray[np.int64]] = []
        self._turn_ends: list[NDArray[np.int32]] = []
        self._turn_rewards: list[NDArray[np.float32]] = []

    def __len__(self) -> int:
        """Rows so far."""
        return len(self._numbers) + len(self._again)

    def again(self, sample_id: int) -> None:
        """Note that a chunk of a sample came though it is held."""
        self._again.append(sample_id)

    def held(self, sample: Sample, chunk: ScoredChunk) -> None:
        """Note a chunk; as `Assembler.on_held`."""
        logprobs = chunk.behaviour_logprobs
        counted = int(np.count_nonzero(logprobs))
        self._numbers.append(
            (
                chunk.sample_id,
                chunk.prompt_id,
                -1 if chunk.episode is None else chunk.episode,
                chunk.attempt,
                chunk.actor,
                len(sample.prompt),
                chunk.start,
                len(chunk.token_ids),
                chunk.weight_version,
                not chunk.sampled,
                counted,
                0 if sample.teacher_prompt is None else len(sample.teacher_prompt),
                0 if sample.contrast_prompt is None else len(sample.contrast_prompt),
                -1 if chunk.finish is None else _FINISHES.index(chunk.finish),
                self._scorers.get(chunk.teacher, -1),
                self._flat(self._further, chunk.further),
                self._flat(self._turn_ends, chunk.turn_ends),
            )
        )
        self._flat(self._turn_rewards, chunk.turn_rewards)
        mean = float(logprobs.sum(dtype=np.float64)) / max(counted, 1)
        self._reals.append((mean, self._of_teacher(chunk, counted), math.nan if chunk.reward is None else chunk.reward))

    def _of_teacher(self, chunk: ScoredChunk, counted: int) -> float:
        if not self._several or not counted or not len(chunk.teacher_logprobs):
            return 0.0
        return float(chunk.teacher_logprobs[chunk.behaviour_logprobs != 0.0].mean(dtype=np.float64))

    @staticmethod
    def _flat(parts: list[Any], values: NDArray[Any] | None) -> int:
        if values is None:
            return 0
        parts.append(values)
        return len(values)

    def message(self) -> Held:
        """All of it, which is then told."""
        numbers = np.array(self._numbers, np.int64).reshape(-1, len(_COLUMNS)).T
        columns: dict[str, Any] = {
            name: column if index < _WIDE else column.astype(np.int32)
            for index, (name, column) in enumerate(zip(_COLUMNS, numbers, strict=True))
        }
        reals = np.array(self._reals, np.float64).reshape(-1, 3)
        message = Held(
            again_ids=np.array(self._again, np.int64),
            mean_behaviour_logprobs=reals[:, 0].astype(np.float32),
            mean_teacher_logprobs=reals[:, 1].astype(np.float32),
            whole_rewards=reals[:, 2],
            further=np.concatenate([np.zeros(0, np.int64), *self._further]),
            turn_ends=np.concatenate([np.zeros(0, np.int32), *self._turn_ends]),
            turn_rewards=np.concatenate([np.zeros(0, np.float32), *self._turn_rewards]),
            **columns,
        )
        self._begin()
        return message


def chunks_of(held: Held, teachers: Sequence[str], *, scored: bool) -> Iterator[HeldChunk]:
    """The chunks of a message, in order, for `Assembler.put`; `scored`: teacher engines score them."""
    named = (*teachers, "")
    rows = zip(*(getattr(held, name).tolist() for name in _COLUMNS), strict=True)
    means, teacher_means = held.mean_behaviour_logprobs.tolist(), held.mean_teacher_logprobs.tolist()
    further_ends = list(accumulate(held.further_counts.tolist()))
    turn_ends = list(accumulate(held.turn_counts.tolist()))
    for i, (sample_id, prompt_id, episode, attempt, actor, prompt, start, length, version, *rest) in enumerate(rows):
        given, counted, teacher_prompt, contrast_prompt, finish, scorer, further, turns = rest
        sampled = 0 if given else length
        reward = float(held.whole_rewards[i]) if finish >= 0 else math.nan
        yield HeldChunk(
            sample_id=sample_id,
            attempt=attempt,
            actor=actor,
            prompt_id=prompt_id,
            prompt_tokens=prompt,
            start=start,
            weight_version=version,
            finish=_FINISHES[finish] if finish >= 0 else None,
            token_ids=_zeros(length),
            behaviour_logprobs=_spread(means[i], counted, sampled),
            teacher_logprobs=_spread(teacher_means[i], counted, sampled if scored else 0),
            context=_zeros(prompt + start),
            reward=None if math.isnan(reward) else reward,
            teacher=named[scorer],
            teacher_prompt=_zeros(teacher_prompt) if teacher_prompt else None,
            contrast_prompt=_zeros(contrast_prompt) if contrast_prompt else None,
            sampled=not given,
            episode=episode if episode >= 0 else None,
            further=held.further[further_ends[i] - further : further_ends[i]] if further else None,
            turn_ends=held.turn_ends[turn_ends[i] - turns : turn_ends[i]] if turns else None,
            turn_rewards=held.turn_rewards[turn_ends[i] - turns : turn_ends[i]] if turns else None,
        )


def _zeros(count: int) -> NDArray[np.int32]:
    """int32[count] that nobody writes to."""
    return _ZEROS[:count] if count <= len(_ZEROS) else np.zeros(count, np.int32)


def _spread(mean: float, counted: int, length: int) -> NDArray[np.float32]:
    """float32[length]: `counted` times the mean, then zeros."""
    if mean == 0.0 and length <= len(_ZEROS):
        return _ZEROS.view(np.float32)[:length]
    values = np.full(length, mean, np.float32)
    if counted < length:
        values[counted:] = 0.0
    return values
