"""Prompts dealt by load: evenly, what is under way stays, and a replica that is gone moves only its own prompts."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.scheduling import frontier
from opd_async.scheduling.admission import DeadlineAdmission
from opd_async.scheduling.leases import LeaseBook, LeaseSpec, PromptOrder
from opd_async.scheduling.routing import Deal

EVENTS = st.lists(st.tuples(st.sampled_from(("begin", "begin", "end", "forget")), st.integers(0, 1 << 16)), max_size=80)


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(1, 5), st.integers(1, 4))
def test_a_prompt_under_way_stays_and_none_has_far_more_than_its_share(
    events: list[tuple[str, int]], replicas: int, group: int
) -> None:
    deal, placed, open_, known, begun = Deal(), {}, set(), set(), 0
    for event, pick in events:
        if event == "begin":
            sample, prompt, begun = begun, begun // group, begun + 1
            load = Counter(placed[one] for one in open_)
            under_way = {placed[one] for one in known if one // group == prompt}
            placed[sample] = deal.of(sample, prompt, range(replicas))
            if under_way:
                assert under_way == {placed[sample]}
            else:
                assert load[placed[sample]] == min(load[replica] for replica in range(replicas))
            open_.add(sample)
            known.add(sample)
        elif known:
            sample = sorted(known)[pick % len(known)]
            (deal.ended if event == "end" else deal.forget)(sample)
            open_.discard(sample)
            known -= {sample} if event == "forget" else set()
    for sample in known:
        assert deal.of(sample, sample // group, range(replicas)) == placed[sample]


def test_a_lost_replica_moves_only_its_own_prompts() -> None:
    deal = Deal()
    before = {sample: deal.of(sample, sample, range(4)) for sample in range(40)}
    assert set(Counter(before.values()).values()) == {10}
    after = {sample: deal.of(sample, sample, (0, 1, 3)) for sample in range(40)}
    assert all(after[sample] == before[sample] for sample in range(40) if before[sample] != 2)
    assert sorted(Counter(after.values()).values()) == [13, 13, 14], "and they are dealt out evenly"
    assert [deal.of(sample, sample, range(4)) for sample in range(40, 44)] == [2, 2, 2, 2], "it is back"
    deal.clear()
    assert [deal.of(sample, sample, range(4)) for sample in range(4)] == [0, 1, 2, 3]


def test_a_lease_book_knows_who_scores_a_sample_until_it_is_trained() -> None:
    book = LeaseBook(frontier.empty(0), PromptOrder(99, 2, 0, shuffle=False), DeadlineAdmission(10**6, 1), slots=99)
    specs = [leased(book) for _ in range(6)]
    assert [book.route(spec, (3, 4, 5)) for spec in specs] == [3, 3, 4, 4, 5, 5], "a prompt has two samples"
    book.ended(0, 0, 8)
    assert book.route(leased(book), (3, 4, 5)) == 3
    book.give_back(2, 1, np.zeros(0, np.int32), complete=False)
    again = leased(book)
    assert again.sample_id == 2 and book.route(again, (3, 4, 5)) == 4, "an attempt after the first"
    for sample_id in (4, 5):
        book.trained(sample_id, 8, complete=True)
    assert [book.route(leased(book), (3, 4, 5)) for _ in range(2)] == [3, 5], "its group is at the first"


def leased(book: LeaseBook) -> LeaseSpec:
    spec = book.lease("a", 0)
    assert spec is not None
    return spec
