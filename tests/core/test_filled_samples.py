"""Steps of whole groups, part by part."""

from __future__ import annotations

from scored_chunks import held

from opd_async.scheduling.assembly import Assembler
from opd_async.scheduling.filled_samples import FilledSamples
from opd_async.scheduling.filled_steps import PARTS


def assembler() -> Assembler:
    """Nothing is older than weights 0."""
    fresh = Assembler()
    fresh.start_at(0)
    return fresh


def test_a_group_is_trained_once_all_its_responses_have_ended() -> None:
    box, policy = assembler(), FilledSamples(4, group_size=2)
    assert policy.ready_tokens(box, 0) == 0 and not policy.round(box, 0, 0).samples
    for sample_id in (0, 3, 5):
        held(box, sample_id=sample_id, end=3, finish="stop")
    held(box, sample_id=1, end=2)
    assert not policy.round(box, 0, 0).samples  # both groups lack a response
    held(box, sample_id=2, end=0, finish="stop")  # an empty one counts
    found = policy.round(box, 0, 0)
    assert ([one.sample_id for one in found.samples], found.closes) == ([2, 3], False)
    assert policy.ready_tokens(box, 0) == 3
    for sample in found.samples:
        box.take(sample)
    held(box, sample_id=4, end=3, finish="stop")  # of the next step: it waits for its weights
    found = policy.round(box, 0, 3)
    assert (found.samples, found.closes, found.drain) == ([], False, False)
    held(box, sample_id=1, end=5, finish="stop")
    found = policy.round(box, 0, 3)
    assert ([one.sample_id for one in found.samples], found.closes) == ([0, 1], True)
    assert not policy.overfull(box, 0, 3)


def test_a_part_has_a_sixteenth_of_a_step_and_the_last_one_closes_it() -> None:
    box, policy = assembler(), FilledSamples(2 * PARTS, group_size=1)
    for sample_id in range(2 * PARTS):
        held(box, sample_id=sample_id, end=1, finish="stop")
    sizes = []
    while not sizes or not sizes[-1][1]:
        found = policy.round(box, 0, 0)
        sizes.append((len(found.samples), found.closes))
        for sample in found.samples:
            box.take(sample)
    assert sizes == [(2, False)] * (PARTS - 1) + [(2, True)]


def test_a_step_takes_what_the_one_before_it_had_left() -> None:
    """A run that was stopped closes its step as it is; what had not ended is generated again, and is no older then."""
    box, policy = assembler(), FilledSamples(2, group_size=1)
    held(box, sample_id=1, end=1, finish="stop")
    for sample in policy.round(box, 0, 0).samples:
        box.take(sample)
    for sample_id in (3, 0, 2):
        held(box, sample_id=sample_id, end=1, finish="stop")
    taken = []
    while not taken or not taken[-1][1]:
        found = policy.round(box, 1, 0)
        taken.append(([one.sample_id for one in found.samples], found.closes))
        for sample in found.samples:
            box.take(sample)
    assert taken == [([0], False), ([2], False), ([3], True)]
