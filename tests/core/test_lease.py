"""The lease of a host: for every history of beats, nothing runs on a host that the launcher has given up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from opd_async.cluster.lease import Lease, beat_seconds

FENCE_S, LOST_S = 6.0, 10.0
TRAVEL_S = st.one_of(st.none(), st.floats(0, 30))
"""How long a message is under way; None for one that is lost."""


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(TRAVEL_S, TRAVEL_S), max_size=20))
def test_the_agent_gives_up_before_the_launcher_does(history: list[tuple[float | None, float | None]]) -> None:
    """Beats and their echoes take any time, or never arrive. The two clocks are never compared."""
    lease, heard = Lease(FENCE_S, 0.0), [0.0]
    echoes: list[tuple[float, int]] = []
    for place, (there, back) in enumerate(history):
        sent = place * beat_seconds(FENCE_S)
        number = lease.beat(sent)
        if there is not None:
            heard.append(sent + there)
            if back is not None:
                echoes.append((sent + there + back, number))
    for at, number in sorted(echoes):
        lease.echoed(number)
        known = max(time for time in heard if time <= at)
        assert lease.left_s(known + LOST_S) <= FENCE_S - LOST_S
    assert lease.left_s(max(heard) + LOST_S) < 0


def test_an_echo_counts_from_the_time_of_its_beat() -> None:
    lease = Lease(FENCE_S, 0.0)
    first, second = lease.beat(1.0), lease.beat(2.0)
    lease.echoed(second)
    assert lease.left_s(2.0) == FENCE_S
    lease.echoed(first)  # late, and of no use any more
    assert lease.left_s(2.0) == FENCE_S
    lease.echoed(77)
    assert lease.left_s(8.5) < 0
