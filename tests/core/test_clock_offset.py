"""Offsets of clocks: what a slow echo, a late one and a drifting clock do to them."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from opd_async.clock import WallClock
from opd_async.cluster.clock_offset import KEPT, WAITING, ClockOffset


@given(
    offset=st.floats(-1e6, 1e6),
    ways=st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.0, 5.0)), min_size=1, max_size=2 * KEPT),
)
def test_an_offset_is_no_further_off_than_it_says(offset: float, ways: list[tuple[float, float]]) -> None:
    one, wall = ClockOffset(), 1e9
    for number, (there, back) in enumerate(ways):
        one.beat(number, wall)
        one.echoed(number, wall + there + offset, wall + there + back)
        wall += 10.0
    assert one.best is not None
    assert abs(one.best.offset_s - offset) <= one.best.error_s + 1e-5
    assert one.best.error_s <= min((there + back) / 2 for there, back in ways[-KEPT:]) + 1e-5


def test_a_clock_that_drifts_is_followed() -> None:
    one = ClockOffset()
    for number in range(10 * KEPT):
        way = 0.0 if number < KEPT else 0.02  # the first echoes were the fastest
        one.beat(number, float(number))
        one.echoed(number, 1.001 * number + way / 2, number + way)
    assert one.best is not None and abs(one.best.offset_s - 0.0095 * KEPT) <= 0.0005 * KEPT + 1e-6


def test_echoes_that_are_none_change_nothing() -> None:
    one = ClockOffset()
    one.echoed(7, 5.0, 5.0)
    one.beat(8, 100.0)
    one.echoed(8, 5.0, 99.0)  # the clock was set back
    assert one.best is None
    for number in range(2 * WAITING):
        one.beat(number, float(number))
    one.echoed(3, 5.0, 500.0)
    assert one.best is None, "forgotten"


def test_a_file_that_is_gone_or_half_written_leaves_what_was_known(tmp_path: Path) -> None:
    file = tmp_path / "offset"
    file.write_text("12.5")
    clock = WallClock(file)
    here = WallClock(None)
    assert abs(clock.now() - here.now() - 12.5) < 1.0
    for content in ("", "nonsense"):
        file.write_text(content)
        clock.refresh()
    file.unlink()
    clock.refresh()
    assert abs(clock.now() - here.now() - 12.5) < 1.0
