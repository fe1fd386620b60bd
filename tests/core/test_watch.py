"""The launcher's watch: what hangs is killed by its role, strangers are named, and changed engines are put right."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from small_runs import small_topology

from opd_async.cluster.supervisor import Exit
from opd_async.engines.pulse import Pulse, parse_pulse
from opd_async.plan.free_ports import free_ports
from opd_async.plan.plan import RoleKind
from opd_async.plan.resolve import make_plan
from opd_async.run import watch as watch_module
from opd_async.run.barrier import BarrierState
from opd_async.run.dispatcher import Dispatcher
from opd_async.run.lifecycle import Lifecycle
from opd_async.run.state import RESYNC, UPDATE, RunState
from opd_async.run.watch import Watch
from opd_async.scheduling.liveness import Work
from opd_async.signals import Signals
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport import messages as m
from opd_async.transport.mailbox import Mailbox

DEADLINE_S = 60.0


class FakeRun:
    """A dispatcher of whom nothing is asked but what the watch asks; time passes when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        topology = small_topology(tmp_path)
        assert topology.supervisor.heartbeat_deadline_s == DEADLINE_S
        self.plan = make_plan(topology)
        self.now, self.killed, self.said = 0.0, [], []
        self.sent: list[tuple[RoleKind, Any]] = []
        running = tuple(role.name for role in self.plan.roles)
        self.fleet: Any = SimpleNamespace(
            supervisor=SimpleNamespace(running=running, kill=self.killed.append),
            say=self.said.append,
            log_folder=lambda: Path("logs"),
        )
        self.metrics = RoleMetrics("launcher")
        self.mailbox = Mailbox()
        self.state = RunState(version=3)
        self.barrier: Any = SimpleNamespace(state=BarrierState.OPEN)
        clock = SimpleNamespace(
            monotonic=lambda: self.now, time=time.time, strftime=time.strftime, localtime=time.localtime
        )
        monkeypatch.setattr(watch_module, "time", clock)
        self.watch = Watch(self)  # type: ignore[arg-type]

    def spawn(self, work: Any, name: str) -> Any:
        raise AssertionError(f"{name} was spawned")

    async def broadcast(self, kind: RoleKind, message: Any) -> list[str]:
        self.sent.append((kind, message))
        return []

    def passes(self, monkeypatch: pytest.MonkeyPatch, moments: list[float]) -> None:
        """Let the watch look at these moments."""

        async def sleep(_: float) -> None:
            if not moments:
                raise asyncio.CancelledError
            self.now = moments.pop(0)

        monkeypatch.setattr(watch_module, "asyncio", SimpleNamespace(sleep=sleep))
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(self.watch.run())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRun:
    return FakeRun(monkeypatch, tmp_path)


def seconds(first: int, last: int) -> list[float]:
    return [float(second) for second in range(first, last)]


def test_a_silent_role_is_killed_once(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.watch.heard("rollout-0")
    run.now = 50.0
    run.watch.heard("intake-0")
    run.now = 0.0
    run.passes(monkeypatch, seconds(1, 70))
    assert run.killed == ["rollout-0"]
    assert run.said == ["rollout-0 hangs: no sign of life for 61 s; killing it, see logs/rollout-0.log"]


def test_nobody_is_killed_because_the_launcher_itself_stood_still(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.now = 1.9
    run.watch.heard("rollout-0")
    run.now = 0.0
    run.passes(monkeypatch, [1.0, 2.0, 3600.0, 3601.0, 3602.0])
    assert run.killed == []


def test_the_learner_is_killed_for_a_rank_that_hangs_and_only_once(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.watch.beat("rank-0", m.RankBeat(0, "Train", 70.0, 1.0, 70.0))
    run.watch.heard("learner-0")
    run.passes(monkeypatch, seconds(1, 100))
    assert run.killed == ["learner-0"]
    assert run.said == [
        "learner-0 hangs (rank-0): at Train for 70 s, nothing of it done for 70 s; the last ones took 1.0 s at most; "
        "killing it, see logs/learner-0.log"
    ]


def test_an_engine_that_hangs_before_the_watch_first_asked_it_is_found(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.watch.engines_answered()
    run.passes(monkeypatch, seconds(1, 70))
    assert sorted(run.killed) == ["student-engine-0", "teacher-engine-0"]


def test_nothing_is_expected_of_an_engine_that_was_not_waited_for(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.watch.engines_answered(but=["student-engine-0"])
    run.passes(monkeypatch, seconds(1, 70))
    assert run.killed == ["teacher-engine-0"]


def test_a_learner_that_has_nothing_to_say_is_no_hang(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.watch.heard("learner-0")
    run.passes(monkeypatch, seconds(1, 100))
    assert run.killed == []


def test_an_error_of_a_wait_names_the_role_since_when_and_its_log(run: FakeRun) -> None:
    run.now = 600.0
    run.watch.heard("rollout-0")
    run.watch.heard("intake-0")
    assert run.watch.witness("rollout-0 to pause") == "rollout-0 was last heard 0 s ago; see logs/rollout-0.log"
    assert run.watch.witness("an optimizer step").startswith(
        "no learner rank is at work, so intake-0 has given it none"
    )
    run.watch.beat("rank-0", m.RankBeat(0, "Train", 500.0, 0.0, 500.0))
    text = run.watch.witness("an optimizer step")
    assert text.startswith("learner-0 (rank-0) is at Train since ") and text.endswith("; see logs/learner-0.log")


def test_a_rank_that_gets_micro_batches_done_is_waited_for(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.mailbox.idle_s() == float("inf") == run.watch.idle_s()
    run.watch.beat("rank-0", m.RankBeat(0, "Train", 5000.0, 1.0, 2.0))
    run.watch.beat("rank-1", m.RankBeat(1, "Train", 5000.0, 1.0, 7.0))
    assert run.watch.idle_s() == 2.0
    run.passes(monkeypatch, seconds(1, 50))
    assert run.killed == [] and run.watch.idle_s() == 51.0
    run.watch.beat("rank-0", m.RankBeat(0, "", 0.0, 0.0, 0.0))
    run.watch.beat("rank-1", m.RankBeat(1, "", 0.0, 0.0, 0.0))
    assert run.watch.idle_s() == float("inf")


def looks(run: FakeRun, *pulses: tuple[str, bool], before: int | None = 3) -> int:
    """How often the weights are asked for when a student engine answers so, in order."""
    for version, paused in pulses:
        run.watch._look_at_student("student-engine-0", Pulse(version, "path", paused, None), before)
    asked = list(run.mailbox._unread.get(UPDATE, ()))
    assert set(asked) <= {RESYNC}
    return len(asked)


def test_an_engine_with_other_weights_twice_in_a_row_is_sent_them_again(run: FakeRun) -> None:
    assert looks(run, ("3", False), ("default", False)) == 0
    assert looks(run, ("default", False)) == 1
    assert run.state.engine_group == 1
    assert run.said == ["student-engine-0 names weights 'default' where the learner sent 3: sending the weights again"]


def test_an_engine_that_somebody_paused_is_sent_the_weights_which_lets_it_go_on(run: FakeRun) -> None:
    assert looks(run, ("3", True), ("3", True)) == 1


def test_nothing_is_odd_while_weights_may_change(run: FakeRun) -> None:
    assert looks(run, ("2", True), ("2", True), before=None) == 0
    run.barrier.state = BarrierState.CLOSED
    assert looks(run, ("2", True), ("2", True)) == 0


def test_engines_that_score_are_looked_at_while_generation_stands(run: FakeRun) -> None:
    """A step may wait for their scores, so that nothing else would find one with other weights; not while these are
    sent."""
    live = SimpleNamespace(opd=SimpleNamespace(on_student_engines=True))
    plan: Any = SimpleNamespace(topology=live)
    run.plan, run.barrier.state = plan, BarrierState.DRAINED
    for stopped, expected in ((False, 3), (True, None)):
        run.barrier.scores_stopped = stopped
        assert run.watch._weights() == expected


@pytest.mark.parametrize("changed", [Pulse("9", "path", None, None), Pulse("1", "zeros", None, None)])
async def test_a_teacher_whose_weights_were_replaced_is_replaced(run: FakeRun, changed: Pulse) -> None:
    first, nobody = Pulse("1", "path", None, None), SimpleNamespace()
    look: Any = run.watch._look_at_teacher
    await look(nobody, "http://x", "teacher-engine-0", first, first, None)
    assert run.killed == []
    await look(nobody, "http://x", "teacher-engine-0", changed, first, None)
    assert run.killed == ["teacher-engine-0"]
    text = f"it names weights {changed.weight_version!r} of {changed.model_path}"
    assert run.sent == [(RoleKind.TEACHER, m.EngineChanged("http://x", text))]


class Sglang:
    """An HTTP side that answers whatever its scheduler does, as SGLang's."""

    def __init__(self) -> None:
        self.paused, self.stopped, self.old = False, False, False
        self.continued: list[str | None] = []
        app = web.Application()
        app.router.add_get("/model_info", self.info)
        app.router.add_get("/ready", self.ready)
        app.router.add_get("/health_generate", self.health)
        app.router.add_post("/continue_generation", self.go_on)
        self.app = app

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": "default", "model_path": "m"})

    async def ready(self, _: web.Request) -> web.Response:
        return web.Response(status=404 if self.old else 503 if self.paused or self.stopped else 200)

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(status=404 if self.old else 503 if self.paused or self.stopped else 200)

    async def go_on(self, request: web.Request) -> web.Response:
        self.continued.append(request.headers.get("Authorization"))
        self.paused = False
        return web.Response()


@pytest.mark.parametrize(
    ("state", "lives", "said"),
    [
        ({}, True, []),
        ({"paused": True}, True, ["teacher-engine-0 was paused by somebody: it goes on"]),
        ({"stopped": True}, False, []),
        ({"old": True}, True, []),
    ],
    ids=["well", "paused by somebody", "its scheduler stands still", "without such routes"],
)
async def test_what_is_behind_an_http_side_is_asked(
    run: FakeRun, state: dict[str, bool], lives: bool, said: list[str]
) -> None:
    server = Sglang()
    vars(server).update(state)
    runner = web.AppRunner(server.app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        run.plan = SimpleNamespace(section=lambda _: SimpleNamespace(api_key="k", admin_api_key="a"))  # type: ignore[assignment]
        async with aiohttp.ClientSession() as session:
            assert await run.watch._scheduler_lives(session, url, "teacher-engine-0") is lives
    finally:
        await runner.cleanup()
    assert run.said == said
    assert set(server.continued) == ({"Bearer a"} if server.continued else set())
    assert bool(server.continued) == any(state.get(name, False) for name in ("paused", "stopped"))


async def test_an_engine_that_a_failed_update_left_standing_is_killed(
    run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its HTTP side takes the question, its scheduler does not answer. One that nobody reaches is on its way up."""

    over = asyncio.Event()

    async def stands(_: web.Request) -> web.Response:
        await over.wait()
        return web.Response()

    async def answers(_: web.Request) -> web.Response:
        return web.json_response({"tp_size": 1})

    runners, urls = [], []
    for handler in (stands, answers, stands):
        app = web.Application()
        app.router.add_get("/server_info", handler)
        runners.append(web.AppRunner(app))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        urls.append(f"http://127.0.0.1:{runners[-1].addresses[0][1]}")
    nobody = f"http://127.0.0.1:{free_ports('127.0.0.1', 1)[0]}"
    ours = dict(zip((*urls[:2], nobody), ("student-engine-0", "student-engine-1", "student-engine-2"), strict=True))
    roles = [
        SimpleNamespace(
            kind=RoleKind.STUDENT_ENGINE, host="127.0.0.1", ports={"http": url.rpartition(":")[2]}, name=name
        )
        for url, name in ours.items()
    ]
    run.plan = SimpleNamespace(  # type: ignore[assignment]
        section=lambda _: SimpleNamespace(api_key="k"), roles=roles, student_engines=[*urls, nobody], teacher_engines=[]
    )
    run.fleet.supervisor.running = tuple(ours.values())
    monkeypatch.setattr(watch_module, "HEALTH_S", 2.0)
    try:
        await run.watch.end_stuck_engines([*urls, nobody])
    finally:
        over.set()
        for runner in runners:
            await runner.cleanup()
    assert run.killed == ["student-engine-0"]
    problem = "no answer in 2 s after a failed weight update"
    assert run.said == [
        f"student-engine-0 hangs: {problem}; killing it, see logs/student-engine-0.log",
        f"{urls[2]}: {problem}; the run did not start it, so whoever did must restart it",
    ]


def test_what_an_engine_says_of_itself() -> None:
    embedded = {"weight_version": "4", "model_path": "m", "paused": True, "step_s": 2.5, "longest_step_s": 0.5}
    assert parse_pulse(embedded) == Pulse("4", "m", True, Work("a step of its model", 2.5, 0.5))
    sglang = {"weight_version": "default", "model_path": "m", "is_generation": True}
    assert parse_pulse(sglang) == Pulse("default", "m", None, None)
    assert [parse_pulse(other) for other in ([], {}, None, {"model_path": "m"})] == [None] * 4


async def test_those_who_start_again_after_a_loss_are_not_taken_for_silent(
    run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the run takes to find its checkpoint and the intake to come up, within the deadline of a start."""
    dispatcher, started = Recovered(run), []
    fleet: Any = run.fleet
    fleet.supervisor.stop, fleet.supervisor.lost, fleet.await_restart = nothing, lambda name: False, nothing

    async def start(name: str, env: dict[str, str]) -> None:
        run.now += 500.0
        started.append(name)

    fleet.start = start
    run.watch.heard("intake-0")
    run.watch.beat("rank-0", m.RankBeat(0, "Train", 1.0, 1.0, 1.0))
    inputs: Any = SimpleNamespace(prompts=SimpleNamespace(prompts=[]))
    lifecycle = Lifecycle(run.plan, inputs, run.said.append, Signals())
    script: Any = SimpleNamespace(abandon_evaluation=lambda: None, forget_samples=nothing)
    await lifecycle._recover(dispatcher, fleet, script)  # type: ignore[arg-type]
    assert started == ["learner-0", "intake-0"] and run.now == 1000.0
    limit = run.plan.topology.supervisor.start_deadline_s + DEADLINE_S
    assert run.watch._live.hanging(run.now + limit - 1.0) == {}
    assert set(run.watch._live.hanging(run.now + limit + 1.0)) == {"intake-0"}


async def nothing(*_: Any) -> None:
    pass


class Recovered(Dispatcher):
    """The dispatcher of a fake run, as far as a recovery needs it."""

    def __init__(self, run: FakeRun) -> None:
        self.plan, self.fleet, self.watch = run.plan, run.fleet, run.watch
        self.mailbox, self.state = run.mailbox, run.state
        self.state.lost = Exit("learner-0", -9, ())
        self.learner_lost = asyncio.Event()
        self._up = {"learner-0", "intake-0"}
        self.on_gone = lambda role: None
        self.ledger: Any = SimpleNamespace(rewind=lambda version, folder: None)


def test_one_metric_counts_hangs_by_role(run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: Counter[str] = Counter()

    class Counting:
        def labels(self, role: str) -> Any:
            return SimpleNamespace(inc=lambda: counted.update([role]))

    run.metrics = {"opd_launcher_hangs_total": Counting()}  # type: ignore[assignment]
    run.watch.heard("teacher-0")
    run.passes(monkeypatch, seconds(1, 70))
    assert counted == {"teacher-0": 1}
