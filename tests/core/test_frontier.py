"""What was trained survives the file, and a restored assembler goes on behind it."""

from __future__ import annotations

from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scored_chunks import context_to, frontier_of, held, scored, token_ids

from opd_async.errors import InputError
from opd_async.files import checksum
from opd_async.scheduling import frontier
from opd_async.scheduling.assembly import Assembler, Verdict
from opd_async.transport.messages import Frontier, Stop
from opd_async.transport.wire import encode


def as_lists(state: Frontier) -> list[object]:
    arrays = (state.completed, state.partial_ids, state.partial_ends, state.partial_tokens)
    return [state.version, *(array.tolist() for array in arrays)]


def trained_assembler() -> Assembler:
    """Samples 0 and 1 complete, 5 trained to 4 of 6 scored tokens, 6 scored only."""
    box = Assembler()
    box.start_at(0)
    for sample_id in (0, 1):
        held(box, sample_id, 3, finish="stop")
        box.take(box.samples[sample_id])
    held(box, 5, 4)
    box.take(box.samples[5])
    held(box, 5, 6)
    held(box, 6, 2)
    return box


def test_a_snapshot_holds_what_was_trained_and_nothing_else() -> None:
    state = frontier.snapshot(trained_assembler(), 9)
    assert as_lists(state) == [9, [[0, 2]], [5], [4], token_ids(0, 4).tolist()]


def test_a_restored_assembler_goes_on_behind_it(tmp_path: Path) -> None:
    frontier.save(frontier.snapshot(trained_assembler(), 9), tmp_path / "step-9")
    box = frontier.restore(frontier.load(tmp_path / "step-9"), attempt_floor=1000)
    assert box.settled(8)
    assert not box.settled(9)
    assert box.add(scored(1, 0, 3, context=True, attempt=1000)) is Verdict.DUPLICATE
    assert box.add(scored(6, 2, 3, attempt=0)) is Verdict.STALE_ATTEMPT
    assert box.add(scored(5, 4, 6, context=True, attempt=1000, weight_version=9, finish="stop")) is Verdict.ACCEPTED
    segment = box.take(box.samples[5])
    assert segment is not None
    assert segment.token_ids.tolist() == context_to(6).tolist()
    assert (segment.start, segment.versions.tolist()) == (4, [9, 9])
    assert frontier.snapshot(box, 10).completed.tolist() == [[0, 2], [5, 6]]


def test_an_empty_frontier(tmp_path: Path) -> None:
    frontier.save(frontier.empty(3), tmp_path)
    state = frontier.load(tmp_path)
    assert as_lists(state) == [3, [], [], [], []]
    box = frontier.restore(state)
    assert not box.samples
    assert len(box.completed) == 0
    assert box.settled(2)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(51, 90)), max_size=3),
    st.dictionaries(st.integers(100, 130), st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=4),
)
def test_restoring_and_taking_a_snapshot_are_inverse(
    completed: list[tuple[int, int]], partial: dict[int, list[int]]
) -> None:
    state = frontier_of(4, completed[:1], {key: tokens for key, tokens in sorted(partial.items()) if tokens})
    assert as_lists(frontier.snapshot(frontier.restore(state), 4)) == as_lists(state)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        b"garbage",
        msgpack.packb(3),
        msgpack.packb({"a": 1}),
        msgpack.packb([1, 2]),
        msgpack.packb([b"x"]),
        msgpack.packb([bytes(frame) for frame in encode(Stop("x"))]),
        msgpack.packb([bytes(frame) for frame in encode(frontier.empty(1))])[:-3],
    ],
)
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    for written in (content, checksum(content) + content):
        (tmp_path / frontier.FILE_NAME).write_bytes(written)
        with pytest.raises(InputError, match=r"frontier\.msgpack"):
            frontier.load(tmp_path)


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    frontier.save(frontier_of(4, [(0, 9), (12, 40)], {41: [1, 2, 3], 43: [7]}), tmp_path)
    path = tmp_path / frontier.FILE_NAME
    whole = path.read_bytes()
    for position in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(InputError, match="its checksum is another"):
            frontier.load(tmp_path)
    path.write_bytes(whole)
    assert frontier.load(tmp_path).version == 4


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"frontier\.msgpack.*resume from an earlier checkpoint"):
        frontier.load(tmp_path)


def test_saving_replaces_the_whole_file(tmp_path: Path) -> None:
    frontier.save(frontier_of(1, [(0, 9)], {12: [1, 2, 3]}), tmp_path)
    frontier.save(frontier_of(2, [(0, 10)]), tmp_path)
    assert as_lists(frontier.load(tmp_path)) == [2, [[0, 10]], [], [], []]
    assert [path.name for path in tmp_path.iterdir()] == [frontier.FILE_NAME]
    assert frontier.load(tmp_path).completed.dtype == np.int64
