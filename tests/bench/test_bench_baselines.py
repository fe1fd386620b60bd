"""The simulated schedules are no worse than they were, and the comparison sees it when they are."""

from __future__ import annotations

import copy

from opd_async.bench.baselines import CASES, compare, counters, load, run


def test_no_counter_got_worse() -> None:
    assert list(compare(load(), counters())) == []


def test_the_same_seed_gives_the_same_figures() -> None:
    workload, rule = CASES[2]
    assert run(workload, rule) == run(workload, rule)


def test_what_gets_worse_is_named() -> None:
    accepted = load()
    case = next(iter(accepted))
    now = copy.deepcopy(accepted)
    now[case]["share_of_bound"] *= 0.94
    now[case]["score_p99_s"] *= 1.06
    now[case]["bubble"] *= 0.5
    assert [line.split(": ")[1].split()[0] for line in compare(accepted, now)] == ["share_of_bound", "score_p99_s"]
    del now[case]
    assert any("no share_of_bound any more" in line for line in compare(accepted, now))
