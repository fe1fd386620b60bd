"""Which responses of a step are shown to people, and whether their parts are put together as they were trained."""

from __future__ import annotations

import numpy as np
from taken_samples import taken

from opd_async.actors.intake.shown import FOLLOWED, SHOWN_TOKENS, ShownSamples
from opd_async.telemetry.samples import printed, trained_row
from opd_async.transport.bounds import problem


def test_a_response_that_was_cut_is_shown_whole() -> None:
    shown = ShownSamples(per_step=1)
    first = [taken(5, 0, 10, complete=False, version=2)]
    assert shown.of_step(first, first, version=3) == []
    last = [taken(5, 10, 16, version=4)]
    (one,) = shown.of_step(last, last, version=4)
    assert (one.version, one.sample_id, one.prompt_id, one.finish, one.reward, one.teacher) == (
        *(4, 5, 4, "length", 0.25, "large"),
    )
    assert one.prompt.tolist() == [7, 8, 9] and one.response.tolist() == list(range(100, 116))
    assert one.behaviour_logprobs.tolist() == [-i for i in range(16)]
    assert one.teacher_logprobs.tolist() == [-2 * i for i in range(16)]
    assert (one.part_ends.tolist(), one.part_versions.tolist()) == ([10, 16], [3, 4])
    assert (one.chunk_ends.tolist(), one.chunk_versions.tolist()) == ([10, 16], [2, 4])
    assert (one.made_at, one.chunk_made_s.tolist(), one.chunk_latency_s.tolist()) == (1010.0, [0, 6], [0.5, 0.5])
    assert problem(one) is None, "it passes the bounds of the wire"
    assert shown.of_step([], [], version=5) == [], "and is forgotten"


def test_an_end_without_tokens_ends_a_followed_response() -> None:
    shown = ShownSamples(per_step=1)
    first = [taken(5, 0, 10, complete=False)]
    shown.of_step(first, first, version=3)
    end = [taken(5, 10, 10)._replace(segment=None, end=10)]
    (one,) = shown.of_step(end, end, version=4)
    assert len(one.response) == one.response_tokens == 10 and one.part_ends.tolist() == [10]


def test_so_many_of_each_step_and_none_whose_beginning_was_not_seen() -> None:
    shown = ShownSamples(per_step=3)
    step = [*(taken(n, 0, 4) for n in range(20)), *(taken(n, 2, 4) for n in range(20, 60))]
    chosen = [one.sample_id for one in shown.of_step(step, step, version=1)]
    assert len(set(chosen)) == 3 and max(chosen) < 20
    assert [one.sample_id for one in ShownSamples(per_step=3).of_step(step, step, version=1)] == chosen
    assert ShownSamples(per_step=0).of_step(step, step, version=1) == []


def test_memory_is_bounded_and_room_comes_back_with_every_end_also_that_of_a_filtered_response() -> None:
    shown = ShownSamples(per_step=1)
    many = [taken(n, 0, 4, complete=False) for n in range(100)]
    shown.of_step(many, many, version=1)
    assert len(shown._followed) == FOLLOWED
    filtered = [taken(n, 4, 6) for n in range(100)]
    assert shown.of_step([], filtered, version=2) == []
    assert not shown._followed


def test_of_a_long_response_the_first_tokens_are_shown() -> None:
    shown = ShownSamples(per_step=1)
    half = [taken(5, 0, SHOWN_TOKENS - 2, complete=False)]
    shown.of_step(half, half, version=1)
    rest = [taken(5, SHOWN_TOKENS - 2, SHOWN_TOKENS + 50)]
    (one,) = shown.of_step(rest, rest, version=2)
    assert (len(one.response), one.response_tokens) == (SHOWN_TOKENS, SHOWN_TOKENS + 50)
    assert len(one.teacher_logprobs) == len(one.behaviour_logprobs) == SHOWN_TOKENS
    assert problem(one) is None


def test_given_tokens_are_shown_in_their_place_without_logprobs() -> None:
    shown = ShownSamples(per_step=1)
    one = taken(5, 0, 10)
    assert one.segment is not None
    one.segment.positions = np.array([0, 1, 2, 6, 7], np.int32)
    one.segment.behaviour_logprobs = np.full(5, -1.0, np.float32)
    one.segment.teacher_logprobs = np.full(5, -2.0, np.float32)
    (found,) = shown.of_step([one], [one], version=0)
    assert found.behaviour_logprobs.tolist() == [-1, -1, -1, 0, 0, 0, -1, -1, 0, 0]
    assert found.teacher_logprobs.tolist() == [-2, -2, -2, 0, 0, 0, -2, -2, 0, 0]
    assert found.given_starts is not None and found.given_starts.tolist() == [3, 8]
    assert found.given_ends is not None and found.given_ends.tolist() == [6, 10]
    assert problem(found) is None, "it passes the bounds of the wire"
    row = trained_row(found, Numbers())
    assert row["given"] == [[3, 6], [8, 10]]
    assert "mean log q - log p -1.000" in printed(row), "of sampled tokens alone"


class Numbers:
    """A tokenizer whose text is numbers."""

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return " ".join(map(str, ids))
