"""The scheduler against a simulated KV pool: what a step reads is always the request's own prefix."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.actors.engine.request import LogprobSpec, Request
from opd_async.actors.engine.sampling import SamplingParams
from opd_async.actors.engine.scheduler import Limits, Scheduler, Work

POOL = 48
LIMITS = Limits(pool_tokens=POOL, context_length=40, max_running=4, prefill_budget=8)


def make_request(rid: str, ids: list[int], new: int, start: int = -1, namespace: str = "") -> Request:
    spec = LogprobSpec(enabled=start >= 0, start=start)
    return Request(rid=rid, input_ids=ids, params=SamplingParams(max_new_tokens=new), logprob=spec, namespace=namespace)


@dataclass
class Pool:
    """Remembers which prefix each slot's KV was computed for."""

    scheduler: Scheduler
    content: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def run(self, works: list[Work]) -> None:
        """Check what the step reads, write what it computes."""
        written: set[int] = set()
        for work in works:
            request = work.request
            row = self.scheduler.table[request.table_row].tolist()
            for position in range(work.start):
                prefix = tuple(request.tokens[: position + 1])
                assert self.content[row[position]] == (request.namespace, prefix)
            for position in range(work.start, work.start + work.count):
                assert 1 <= row[position] <= POOL
                assert row[position] not in written
                written.add(row[position])
        for work in works:
            request = work.request
            row = self.scheduler.table[request.table_row].tolist()
            for position in range(work.start, work.start + work.count):
                self.content[row[position]] = (request.namespace, tuple(request.tokens[: position + 1]))

    def check_conserved(self) -> None:
        """Every slot is free, in the tree, or owned by exactly one running request."""
        scheduler = self.scheduler
        owned = [
            slot
            for request in scheduler.running.values()
            for slot in scheduler.table[request.table_row, request.tree_tokens : request.computed].tolist()
        ]
        tree = [slot for node in scheduler.cache.nodes() for slot in node.slots.tolist()]
        assert len(set(owned + tree)) == len(owned) + len(tree) == POOL - scheduler.pool.free_count


def step(pool: Pool) -> int:
    """One engine step with a deterministic stand-in for the model; returns how many tokens it computed."""
    scheduler = pool.scheduler
    works = scheduler.plan()
    pool.run(works)
    scheduler.commit(works)
    for work in works:
        request = work.request
        if work.completes and not request.prefill_only:
            request.append(sum(request.tokens) % 3, -1.0, "v")
        if work.completes and request.prefill_only:
            request.finish({"type": "length", "length": 0}, "v")
        if request.finished:
            scheduler.release(request)
    pool.check_conserved()
    return sum(work.count for work in works)


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=20),
        st.integers(0, 20),
        st.integers(-1, 20),
        st.sampled_from(["", "v1"]),
        st.sampled_from(["none", "abort", "retract"]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(REQUESTS)
def test_everything_finishes_and_nothing_leaks(specs: list[tuple[list[int], int, int, str, str]]) -> None:
    scheduler = Scheduler(LIMITS)
    pool = Pool(scheduler)
    requests = []
    for index, (ids, new, start, namespace, event) in enumerate(specs):
        request = make_request(str(index), ids, new, min(start, len(ids)), namespace)
        requests.append(request)
        scheduler.submit(request)
        step(pool)
        if event == "retract":
            scheduler.retract_all()
        elif event == "abort" and not requests[index // 2].finished:
            requests[index // 2].finish({"type": "abort"}, "v")
            scheduler.release(requests[index // 2])
        pool.check_conserved()
    for _ in range(2000):
        if scheduler.idle():
            break
        assert step(pool) > 0
    assert all(request.finished for request in requests)
    assert scheduler.flush()
    assert scheduler.pool.free_count == POOL


def test_the_youngest_is_retracted_and_all_finish() -> None:
    scheduler = Scheduler(LIMITS)
    pool = Pool(scheduler)
    requests = [make_request(str(i), [i % 3] * 6 + [i], 24) for i in range(4)]
    for request in requests:
        scheduler.submit(request)
    while not scheduler.idle():
        step(pool)
    assert scheduler.retractions > 0
    assert requests[0].num_retractions == 0
    assert [len(request.output_ids) for request in requests] == [24] * 4


@pytest.mark.parametrize(("start", "cached"), [(-1, 9), (0, 0), (4, 4), (9, 9), (10, 9)])
def test_cached_prefix_is_capped_by_logprob_start(start: int, cached: int) -> None:
    scheduler = Scheduler(LIMITS)
    pool = Pool(scheduler)
    ids = [0, 1, 2, 0, 1, 2, 2, 1, 0, 1]
    scheduler.submit(make_request("a", ids, 0))
    step(pool)
    step(pool)
    second = make_request("b", ids, 0, start)
    scheduler.submit(second)
    step(pool)
    assert second.cached_tokens == cached


def test_a_hold_admits_only_earlier_requests() -> None:
    scheduler = Scheduler(LIMITS)
    pool = Pool(scheduler)
    scheduler.submit(make_request("early", [1], 2))
    scheduler.hold_from = scheduler.next_serial
    scheduler.submit(make_request("late", [2], 2))
    while not scheduler.idle():
        step(pool)
    assert [request.rid for request in scheduler.waiting] == ["late"]
    scheduler.hold_from = None
    assert not scheduler.idle()


def test_flush_is_refused_while_a_request_holds_kv() -> None:
    scheduler = Scheduler(LIMITS)
    pool = Pool(scheduler)
    scheduler.submit(make_request("a", [1, 2], 3))
    step(pool)
    assert not scheduler.flush()
    scheduler.retract_all()
    assert scheduler.flush()
    assert scheduler.pool.free_count == POOL
