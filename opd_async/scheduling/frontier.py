"""What has been trained, as a file in the checkpoint: the reason why a resumed run trains nothing twice.

The set of trained (sample, start, end) ranges is kept as completed samples (intervals of ids) and, for responses that
were being generated, the trained tokens from 0 to `trained_end`: generation goes on behind them. Further samples of
episodes are all completed, as far as they were begun: nobody goes on with one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
from numpy.typing import NDArray

from opd_async.errors import InputError, WireError
from opd_async.files import CHECKSUM_BYTES, checksum, write_atomically
from opd_async.scheduling.assembly import Assembler
from opd_async.scheduling.further import FURTHER_IDS, is_further
from opd_async.scheduling.intervals import IntervalSet
from opd_async.transport.bounds import receive
from opd_async.transport.messages import Frontier
from opd_async.transport.wire import encode

FILE_NAME = "frontier.msgpack"


def empty(version: int) -> Frontier:
    """The frontier of a run that has trained nothing."""
    none = np.zeros(0, np.int32)
    return Frontier(version, np.zeros((0, 2), np.int64), none.astype(np.int64), none, none)


def given_of(frontier: Frontier) -> NDArray[np.int32]:
    """int32[n]: of each partly trained sample, how many of the trained tokens were given and not sampled."""
    given = frontier.partial_given
    return np.zeros(len(frontier.partial_ids), np.int32) if given is None else given


def snapshot(assembler: Assembler, version: int) -> Frontier:
    """The frontier right after the step that made `version`."""
    leased = (s for s in assembler.samples.values() if s.trained_end and not is_further(s.sample_id))
    partial = sorted(leased, key=lambda s: s.sample_id)
    tokens = [s.response()[: s.trained_end] for s in partial]
    given = np.array([s.given - s.untrained_given for s in partial], np.int32)
    return Frontier(
        version=version,
        completed=_completed(assembler),
        partial_ids=np.array([s.sample_id for s in partial], np.int64),
        partial_ends=np.array([s.trained_end for s in partial], np.int32),
        partial_tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
        partial_given=given if given.any() else None,
    )


def _completed(assembler: Assembler) -> NDArray[np.int64]:
    """int64[n, 2]: intervals of samples of which nothing more is to be trained, once this is gone back to."""
    found = list(assembler.completed)
    ends = [high for _, high in found if is_further(high - 1)]
    ends += [sample_id + 1 for sample_id in assembler.samples if is_further(sample_id)]
    leased = [one for one in found if not is_further(one[0])]
    return IntervalSet([*leased, *([(FURTHER_IDS, max(ends))] if ends else [])]).to_array()


def restore(
    frontier: Frontier, attempt_floor: int = 0, topk: int = 0, *, teacher: bool = True, contrast: bool = False
) -> Assembler:
    """An assembler that holds nothing but what was trained, refuses attempts below `attempt_floor`, and wants `topk`
    ids of the teacher on every token and its `contrast`, or nothing of a `teacher` at all."""
    completed = IntervalSet.from_array(frontier.completed)
    assembler = Assembler(completed, attempt_floor, topk, teacher=teacher, contrast=contrast)
    parts = np.split(frontier.partial_tokens, np.cumsum(frontier.partial_ends)[:-1])
    for sample_id, tokens, given in zip(frontier.partial_ids, parts, given_of(frontier), strict=False):
        assembler.restore(int(sample_id), tokens, int(given))
    assembler.start_at(frontier.version)
    return assembler


def share(frontier: Frontier, holds: Callable[[int], bool]) -> Frontier:
    """The same with those partly trained samples alone that an intake `holds`."""
    held = np.array([holds(sample_id) for sample_id in frontier.partial_ids.tolist()], bool)
    parts = np.split(frontier.partial_tokens, np.cumsum(frontier.partial_ends)[:-1])
    tokens = [part for part, mine in zip(parts, held, strict=False) if mine]
    return replace(
        frontier,
        partial_ids=frontier.partial_ids[held],
        partial_ends=frontier.partial_ends[held],
        partial_tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
        partial_given=given_of(frontier)[held],
    )


def joined(frontier: Frontier, elsewhere: Mapping[int, NDArray[np.int32]], holds: Callable[[int], bool]) -> Frontier:
    """The frontier of an intake that does not know the tokens of samples which it does not `hold`, with what is trained
    of those by the word of their holders. `ValueError` names a sample that is not the same on both sides."""
    known = dict(elsewhere)
    own = np.split(frontier.partial_tokens, np.cumsum(frontier.partial_ends)[:-1])
    tokens = []
    for sample_id, end, mine in zip(frontier.partial_ids.tolist(), frontier.partial_ends.tolist(), own, strict=False):
        found = mine if holds(sample_id) else known.pop(sample_id, None)
        if found is None or len(found) != end:
            raise ValueError(f"sample {sample_id} is trained up to {end}, and its intake says otherwise")
        tokens.append(found)
    if known:
        raise ValueError(f"sample {min(known)} is partly trained by the word of its intake alone")
    return replace(frontier, partial_tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int32))


def save(frontier: Frontier, folder: Path) -> None:
    """Write `folder/frontier.msgpack` atomically, making the folder if need be: its checksum, then its frames."""
    folder.mkdir(parents=True, exist_ok=True)
    content = msgpack.packb([bytes(frame) for frame in encode(frontier)])
    write_atomically(folder / FILE_NAME, checksum(content) + content)


def load(folder: Path) -> Frontier:
    """Read what `save` wrote; `InputError` names the file when it cannot be used."""
    path = folder / FILE_NAME
    try:
        raw = path.read_bytes()
        written, content = raw[:CHECKSUM_BYTES], raw[CHECKSUM_BYTES:]
        if written != checksum(content):
            raise ValueError("damaged: its checksum is another")
        frames = msgpack.unpackb(content)
        if not isinstance(frames, list) or not all(isinstance(frame, bytes) for frame in frames):
            raise ValueError("not a list of frames")
        frontier = receive(frames)
    except (OSError, ValueError, WireError) as error:
        raise InputError(f"{path}: not a readable frontier ({error}); resume from an earlier checkpoint") from None
    if not isinstance(frontier, Frontier):
        raise InputError(f"{path}: holds a {type(frontier).__name__}, not a frontier")
    return frontier
