"""Engines that are far slower than their peers are found by medians, and nothing else is taken for one."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import small_topology

from opd_async.plan.plan import RoleKind
from opd_async.plan.resolve import make_plan
from opd_async.run.slow_engines import SlowEngines
from opd_async.scheduling.pace import IN_A_ROW, MAX_REST_S, REST_S, WINDOW_S, Answers, Pace, Paces
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport import messages as m

FAST, SLOW = Pace(20, 0.1, 0.02), Pace(20, 10.0, 2.0)


def stream(answers: Answers, name: str, waits: list[float], tokens: int = 4, began: float = 0.0) -> float:
    """A request with an answer after each of `waits`; returns when the last one came."""
    answers.asked(name, began)
    now = began
    for wait_s in waits:
        now += wait_s
        answers.answered(name, now, tokens)
    return now


def test_the_pace_is_a_median_for_answers_and_for_tokens() -> None:
    answers = Answers(streams=True)
    now = stream(answers, "a", [0.2, 0.4, 9.0, 0.2, 0.4, 0.2, 0.2])
    assert answers.pace(now) == pytest.approx((7, 0.2, 0.05))


def test_what_is_still_waited_for_counts_once_it_takes_longer() -> None:
    answers = Answers(streams=True)
    for name in "abcde":
        stream(answers, name, [0.2])
    assert answers.pace(0.3) == pytest.approx((5, 0.2, 0.05))
    assert answers.pace(10.2) == pytest.approx((10, 5.1, 1.275)), "five of 0.2 s, five that have waited 10 s"
    assert answers.pace(WINDOW_S + 20.2) == pytest.approx((5, 40.0, 40.0)), "the old ones have gone"
    answers.resumed(50.0)
    assert answers.pace(51.0) == pytest.approx((5, 1.0, 1.0)), "while generation was paused nobody was slow"
    for name in "abcde":
        answers.ended(name)
    assert answers.pace(60.0) is None


def test_streams_in_a_queue_say_nothing_while_others_are_answered() -> None:
    answers = Answers(streams=True)
    for name in range(20):
        answers.asked(f"queued {name}", 0.0)
    stream(answers, "a", [0.2] * 5, began=9.0)
    pace = answers.pace(10.0)
    assert pace is not None and pace.answers == 5 and pace.wait_s == pytest.approx(0.2)
    answers.ended("a")
    pace = answers.pace(10.0 + WINDOW_S + 1.0)
    assert pace is not None and pace.answers == 20, "but they do when nobody is"


def test_a_batch_that_is_still_scored_counts() -> None:
    answers = Answers(streams=False)
    for name, began in enumerate((0.0, 1.0, 2.0)):
        stream(answers, str(name), [0.1], tokens=100, began=began)
        answers.ended(str(name))
    for name in "abcd":
        answers.asked(name, 3.0)
    assert answers.pace(13.0) == pytest.approx((7, 10.0, 0.1))


def test_too_few_answers_say_nothing_unless_they_take_very_long() -> None:
    answers = Answers(streams=False)
    answers.asked("a", 0.0)
    assert answers.pace(10.0) is None
    assert answers.pace(31.0) == pytest.approx((1, 31.0, 31.0))
    answers.answered("nobody", 31.0, 5)
    answers.answered("a", 31.0, 0)
    assert answers.pace(31.0) == pytest.approx((1, 31.0, 31.0)), "only tokens of requests are answers"


def hear(paces: Paces, now: float, **read: Pace) -> list[str]:
    return [url for url, pace in read.items() if paces.heard(url, "students", pace, now) is not None]


def test_the_slow_one_is_found_after_some_times_in_a_row() -> None:
    paces = Paces(20.0)
    for turn in range(IN_A_ROW - 1):
        assert hear(paces, float(turn), a=FAST, b=SLOW, c=FAST) == []
    assert hear(paces, 3.0, a=FAST, b=FAST, c=FAST) == [], "a good reading begins the count anew"
    for turn in range(4, 3 + IN_A_ROW):
        assert hear(paces, float(turn), a=FAST, b=SLOW, c=FAST) == []
    assert hear(paces, 8.0, a=FAST, b=SLOW, c=FAST) == ["b"] and paces.slow == ["b"]
    assert hear(paces, 9.0, a=FAST, b=SLOW, c=FAST) == [], "it is found once"


@pytest.mark.parametrize(
    ("pace", "peer"),
    [
        (Pace(20, 0.9, 0.2), Pace(20, 0.01, 0.002)),  # an answer within a second
        (Pace(20, 1.9, 0.38), FAST),  # not so many times as long
        (Pace(20, 10.0, 0.02), FAST),  # longer answers, of as many more tokens
        (Pace(20, 0.1, 2.0), FAST),  # fewer tokens in each answer
        (SLOW, SLOW),
        (FAST, SLOW),
    ],
)
def test_what_is_not_slow(pace: Pace, peer: Pace) -> None:
    paces = Paces(20.0)
    for turn in range(20):
        assert "b" not in hear(paces, float(turn), a=peer, b=pace, c=peer)


def test_without_peers_at_work_nobody_is_judged() -> None:
    paces = Paces(20.0)
    paces.heard("t", "teacher", FAST, 0.0)
    for turn in range(20):
        assert hear(paces, float(turn), a=SLOW) == [], "a teacher is no peer of a student"
    hear(paces, 20.0, b=FAST)
    for turn in range(20):
        assert hear(paces, 31.0 + turn, a=SLOW) == [], "an old pace is none to compare with"


def until_slow(paces: Paces, now: float) -> float:
    for turn in range(IN_A_ROW):
        hear(paces, now + turn, a=FAST, b=SLOW)
    assert paces.slow == ["b"]
    return now + IN_A_ROW - 1


def test_a_slow_engine_is_tried_again_later_and_later() -> None:
    paces, now, rests = Paces(20.0), 0.0, []
    for _ in range(8):
        found = now = until_slow(paces, now)
        while not paces.to_try(now):
            now += 1.0
        rests.append(now - found)
        assert paces.slow == []
    assert rests == [min(REST_S * 2**turn, MAX_REST_S) for turn in range(8)]
    now += 10 * MAX_REST_S
    found = now = until_slow(paces, now)
    assert paces.to_try(found + REST_S - 1.0) == [] and paces.to_try(found + REST_S) == ["b"], "it has long done well"


def test_the_one_that_rests_is_no_peer_and_a_restart_ends_its_rest() -> None:
    paces = Paces(20.0)
    now = until_slow(paces, 0.0)
    for turn in range(10):
        assert hear(paces, now + turn, a=SLOW) == []
    assert not paces.restarted("a", now) and not paces.restarted("nobody", now)
    assert paces.restarted("b", now) and paces.slow == []


class Run:
    """A dispatcher of whom nothing is asked but what the comparison needs."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.plan: Any = make_plan(small_topology(folder, *overrides))
        self.said: list[str] = []
        self.killed: list[str] = []
        self.sent: list[tuple[str, m.EngineSlow]] = []
        running = tuple(role.name for role in self.plan.roles)
        self.fleet: Any = SimpleNamespace(
            supervisor=SimpleNamespace(running=running, kill=self.killed.append), say=self.said.append
        )
        self.ledger: Any = SimpleNamespace(slow_engines=defaultdict(int))
        self.metrics = RoleMetrics("launcher")
        self.server: Any = SimpleNamespace(send=self.send)
        self.slow = SlowEngines(self)

    def up(self, kind: RoleKind) -> list[str]:
        return [role.name for role in self.plan.of_kind(kind)]

    async def send(self, actor: str, message: m.EngineSlow) -> None:
        self.sent.append((actor, message))

    def hear(self, urls: tuple[str, ...]) -> None:
        """The first of `urls` is slow."""
        for _ in range(IN_A_ROW):
            for url in reversed(urls):
                asyncio.run(self.slow.heard(m.EnginePace(url, *(SLOW if url == urls[0] else FAST))))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_actor_of_a_slow_engine_is_told_and_so_is_one_that_comes_up(tmp_path: Path, side: str) -> None:
    run = Run(tmp_path, f"engines.{side}.replicas=3")
    urls = run.plan.student_engines if side == "student" else run.plan.teacher_engines
    actor = "rollout-0" if side == "student" else "teacher-0"
    run.hear(urls)
    assert run.sent == [(actor, m.EngineSlow(urls[0], True))] and run.killed == []
    assert run.said == [
        f"{side}-engine-0 is slow: it takes 2 s for each token where its peers take 0.02 s (10 s for an answer, they "
        "0.1 s); its work goes to its peers"
    ]
    assert run.ledger.slow_engines == {f"{side}-engine-0": 1}
    asyncio.run(run.slow.tell(actor))
    assert run.sent[1:] == [(actor, m.EngineSlow(urls[0], True))]
    asyncio.run(run.slow.restarted(f"{side}-engine-0"))
    assert run.sent[2:] == [(actor, m.EngineSlow(urls[0], False))]
    asyncio.run(run.slow.tell(actor))
    assert run.sent[3:] == []


@pytest.mark.parametrize("compared", ["20.0", "null"])
def test_others_do_the_work_of_an_engine_that_is_given_up_until_it_is_back(tmp_path: Path, compared: str) -> None:
    run = Run(tmp_path, "engines.student.replicas=4", "rollout.replicas=2", f"supervisor.slow_engine={compared}")
    urls, gone = run.plan.student_engines, "student-engine-2"
    engines = {f"student-engine-{index}" for index in range(4)}
    assert run.slow.without_engine(gone, engines - {gone}) is None
    assert run.slow.without_engine(gone, engines - {gone, "student-engine-0"}) == "rollout-0"
    asyncio.run(run.slow.given_up(gone))
    assert run.sent == [(f"rollout-{index}", m.EngineSlow(urls[2], True)) for index in range(2)]
    asyncio.run(run.slow.tell("rollout-1"))
    assert run.sent[2:] == [("rollout-1", m.EngineSlow(urls[2], True))], "also those that come up later"
    asyncio.run(run.slow.restarted(gone))
    assert run.sent[3:] == [(f"rollout-{index}", m.EngineSlow(urls[2], False)) for index in range(2)]
    asyncio.run(run.slow.restarted(gone))
    assert len(run.sent) == 5 and run.said == []


def test_behind_a_router_no_actor_has_an_engine_of_its_own(tmp_path: Path) -> None:
    run = Run(tmp_path, "engines.student.replicas=2")
    run.plan = SimpleNamespace(
        engine_names=run.plan.engine_names, driven_by=lambda _: ("http://router:1",), of_kind=run.plan.of_kind
    )
    assert run.slow.without_engine("student-engine-0", set()) is None


def test_an_engine_that_the_run_did_not_start_is_there_for_its_actor(tmp_path: Path) -> None:
    run = Run(tmp_path, "engines.student.replicas=2")
    urls, names, other = run.plan.student_engines, run.plan.engine_names, "http://other:1"
    run.plan = SimpleNamespace(
        engine_names={**names, other: other}, driven_by=lambda _: (*urls, other), of_kind=run.plan.of_kind
    )
    assert run.slow.without_engine("student-engine-0", set()) is None


def test_an_engine_whose_actor_has_no_other_is_restarted_once(tmp_path: Path) -> None:
    run = Run(tmp_path, "engines.student.replicas=2", "rollout.replicas=2")
    run.hear(run.plan.student_engines)
    assert run.killed == ["student-engine-0"] and run.sent == [] and "killing it" in run.said[-1]
    asyncio.run(run.slow.restarted("student-engine-0"))
    run.hear(run.plan.student_engines)
    assert run.killed == ["student-engine-0"] and run.said[-1].endswith("its actor has no other engine, so it goes on")


def test_null_compares_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "engines.student.replicas=2", "supervisor.slow_engine=null")
    run.hear(run.plan.student_engines)
    asyncio.run(run.slow.tell("rollout-0"))
    assert run.said == [] and run.sent == []
