"""The radix tree: exact prefixes, locks, eviction, no leak."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.actors.engine.radix import Node, RadixCache
from opd_async.actors.engine.slots import SlotPool

CAPACITY = 60
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("use"), st.sampled_from(["", "v1"]), TOKENS),
        st.tuples(st.just("release"), st.integers(0, 5), st.none()),
        st.tuples(st.just("evict"), st.integers(1, 20), st.none()),
    ),
    max_size=40,
)


def cached_prefixes(cache: RadixCache) -> dict[str, set[tuple[int, ...]]]:
    found: dict[str, set[tuple[int, ...]]] = {}
    for node in cache.nodes():
        path: list[int] = []
        here: Node | None = node
        while here is not None:
            path = here.key + path
            here = here.parent
        prefixes = found.setdefault(node.namespace, set())
        prefixes.update(tuple(path[:i]) for i in range(1, len(path) + 1))
    return found


def check(cache: RadixCache, pool: SlotPool, held: list[Node]) -> None:
    nodes = list(cache.nodes())
    slots = [slot for node in nodes for slot in node.slots.tolist()]
    assert len(slots) == len(set(slots))
    assert pool.free_count + len(slots) == CAPACITY
    assert all(len(node.key) == len(node.slots) > 0 for node in nodes)
    locked = {id(node) for node in nodes if node.locks}
    assert cache.locked_tokens == sum(len(node.key) for node in nodes if node.locks)
    assert cache.evictable_tokens == len(slots) - cache.locked_tokens
    for node in held:
        here: Node | None = node
        while here is not None and here.parent is not None:
            assert id(here) in locked
            here = here.parent


def use(cache: RadixCache, pool: SlotPool, namespace: str, tokens: list[int]) -> Node | None:
    """What a request does: match, take slots for the rest, insert, give duplicates back, hold the end."""
    expected = max(
        (len(p) for p in cached_prefixes(cache).get(namespace, set()) if tokens[: len(p)] == list(p)), default=0
    )
    node, slots = cache.match(namespace, tokens, len(tokens))
    assert len(slots) == expected
    cache.lock(node)
    missing = len(tokens) - len(slots)
    if pool.free_count < missing:
        pool.give_back(cache.evict(missing - pool.free_count))
    if pool.free_count < missing:
        cache.unlock(node)
        return None
    row = np.concatenate([slots, pool.take(missing)])
    end, present = cache.insert(namespace, tokens, row)
    assert present == len(slots)
    cache.lock(end)
    cache.unlock(node)
    return end


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_slots_and_counts_are_conserved(operations: list[tuple[str, object, object]]) -> None:
    cache, pool = RadixCache(), SlotPool(CAPACITY)
    held: list[Node] = []
    for kind, first, second in operations:
        if kind == "use":
            assert isinstance(first, str)
            assert isinstance(second, list)
            end = use(cache, pool, first, second)
            if end is not None:
                held.append(end)
        elif kind == "release" and held:
            assert isinstance(first, int)
            cache.unlock(held.pop(first % len(held)))
        elif kind == "evict":
            assert isinstance(first, int)
            before = cache.evictable_tokens
            gone = cache.evict(first)
            assert len(gone) >= min(first, before)
            pool.give_back(gone)
        check(cache, pool, held)
    for node in held:
        cache.unlock(node)
    pool.give_back(cache.clear())
    assert pool.free_count == CAPACITY
    assert not list(cache.nodes())


def test_least_recently_used_goes_first() -> None:
    cache = RadixCache()
    cache.insert("", [1, 2, 3], np.array([1, 2, 3], np.int32))
    cache.insert("", [1, 2, 4], np.array([1, 2, 4], np.int32))
    cache.insert("", [5], np.array([5], np.int32))
    cache.match("", [1, 2, 3], 3)
    assert cache.evict(1).tolist() == [4]
    assert cache.evict(1).tolist() == [5]
    assert len(cache.match("", [1, 2, 3], 3)[1]) == 3


def test_insert_keeps_the_tree_s_slots_and_reports_duplicates() -> None:
    cache = RadixCache()
    cache.insert("", [1, 2], np.array([7, 8], np.int32))
    _, present = cache.insert("", [1, 2, 3], np.array([4, 5, 6], np.int32))
    assert present == 2
    assert cache.match("", [1, 2, 3], 3)[1].tolist() == [7, 8, 6]


def test_a_match_is_cut_at_its_limit() -> None:
    cache = RadixCache()
    cache.insert("", [1, 2, 3, 4], np.array([1, 2, 3, 4], np.int32))
    assert cache.match("", [1, 2, 3, 4], 2)[1].tolist() == [1, 2]


def test_misuse_is_refused() -> None:
    cache, pool = RadixCache(), SlotPool(2)
    node, _ = cache.insert("", [1], np.array([1], np.int32))
    with pytest.raises(ValueError, match="not locked"):
        cache.unlock(node)
    with pytest.raises(ValueError, match="3 KV slots asked for"):
        pool.take(3)
    with pytest.raises(ValueError, match="twice"):
        pool.give_back(np.array([1], np.int32))
