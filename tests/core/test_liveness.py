"""What hangs and what only takes long, under a virtual clock."""

from __future__ import annotations

import pytest

from opd_async.scheduling.liveness import Liveness, Work

SILENCE_S, LONGEST_S = 60.0, 600.0


def live() -> Liveness:
    return Liveness(SILENCE_S, LONGEST_S)


def test_silence_is_a_hang_after_its_deadline_and_says_for_how_long() -> None:
    watch = live()
    watch.heard("intake-0", 0.0)
    watch.heard("rollout-0", 50.0)
    assert watch.hanging(60.0) == {}
    assert watch.hanging(61.0) == {"intake-0": "no sign of life for 61 s"}
    watch.spoke("intake-0", 62.0)
    assert watch.hanging(70.0) == {}


def test_nothing_is_expected_of_who_was_never_heard_or_has_ended() -> None:
    watch = live()
    watch.heard("teacher-0", 0.0)
    watch.forget("teacher-0")
    assert watch.hanging(1e6) == {}


def test_who_starts_has_its_time_to_come_up() -> None:
    watch = live()
    watch.heard("rollout-0", 180.0)
    assert watch.hanging(239.0) == {}
    assert "rollout-0" in watch.hanging(241.0)


def test_nobody_hangs_for_the_time_in_which_nobody_listened() -> None:
    watch = live()
    watch.heard("rollout-0", 0.0)
    watch.absent(3600.0)
    assert watch.hanging(3650.0) == {}
    assert "rollout-0" in watch.hanging(3661.0)


@pytest.mark.parametrize(
    ("usual_s", "allowed_s"),
    [(0.0, 480.0), (0.5, 60.0), (10.0, 200.0), (1000.0, 480.0)],
    ids=["unknown", "short", "scaled", "never beyond what others wait"],
)
def test_work_may_take_twenty_times_as_long_as_usual(usual_s: float, allowed_s: float) -> None:
    watch = live()
    assert watch.allowed_s(Work("Train", 1.0, usual_s)) == allowed_s


def test_a_rank_that_beats_at_the_same_step_for_ever_is_a_deadlock() -> None:
    watch = live()
    watch.heard("rank-1", 1000.0, Work("Train", 199.0, usual_s=10.0))
    assert watch.hanging(1000.0) == {}
    watch.heard("rank-1", 1002.0, Work("Train", 201.0, usual_s=10.0))
    assert watch.hanging(1002.0) == {"rank-1": "at Train for 201 s; the last ones took 10.0 s at most"}
    watch.heard("rank-1", 1003.0)
    assert watch.hanging(1003.0) == {}


def test_a_step_that_gets_micro_batches_done_may_take_as_long_as_it_needs() -> None:
    watch = live()
    watch.heard("rank-0", 0.0, Work("Train", 100_000.0, usual_s=1.0, still_s=59.0))
    assert watch.hanging(0.0) == {} and watch.working(1.0)["rank-0"].without_progress_s == 60.0
    watch.heard("rank-0", 9.0, Work("Train", 100_009.0, usual_s=1.0, still_s=61.0))
    assert watch.hanging(9.0) == {
        "rank-0": "at Train for 100009 s, nothing of it done for 61 s; the last ones took 1.0 s at most"
    }
    watch.heard("rank-0", 9.0, Work("Train", 100_009.0, still_s=479.0))
    assert watch.hanging(9.0) == {}, "the first step of a run"


def test_silence_says_what_the_process_was_at() -> None:
    watch = live()
    watch.heard("rank-0", 0.0, Work("SaveCheckpoint", 3.0))
    assert watch.hanging(61.0) == {"rank-0": "no sign of life for 61 s; it was at SaveCheckpoint then"}


def test_work_goes_on_between_two_signs() -> None:
    watch = live()
    watch.heard("rank-0", 10.0, Work("Train", 3.0))
    watch.heard("rank-1", 10.0)
    assert watch.working(15.0) == {"rank-0": Work("Train", 8.0)}
