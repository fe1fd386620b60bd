"""Rendezvous hashing: stable, even, and a lost replica moves only its own prompts."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.scheduling.routing import rendezvous

PINNED = [1, 2, 2, 2, 2, 3, 3, 1, 3, 3, 2, 0]
REPLICAS = st.sets(st.integers(0, 20), min_size=2, max_size=6)


def test_pinned_choices() -> None:
    """They must be the same in every process, machine and release: an actor and its successor agree."""
    assert [rendezvous(key, range(4)) for key in range(12)] == PINNED


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**62), REPLICAS)
def test_a_lost_replica_moves_only_its_own_keys(key: int, replicas: set[int]) -> None:
    chosen = rendezvous(key, replicas)
    assert chosen == rendezvous(key, sorted(replicas, reverse=True))
    for lost in replicas - {chosen}:
        assert rendezvous(key, replicas - {lost}) == chosen


def test_keys_spread_evenly() -> None:
    counts = Counter(rendezvous(key, range(4)) for key in range(4000))
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 850


def test_a_salt_makes_choices_independent() -> None:
    """Of the prompts of one actor, each of its engines gets its share."""
    mine = [key for key in range(4000) if rendezvous(key, range(2)) == 0]
    engines = Counter(rendezvous(key, range(2), "engine") for key in mine)
    assert min(engines.values()) > 0.45 * len(mine)
