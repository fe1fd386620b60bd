"""Every message with every absurd field: dropped where it enters, and nothing of the run changes."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import pickle
import typing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zmq.asyncio
from scored_chunks import scored
from small_runs import small_topology

from opd_async.data.completions import CompletionSet, Mix
from opd_async.data.prompts import Prompt
from opd_async.errors import WireError
from opd_async.keys import RunKeys
from opd_async.plan.chunk_bounds import ChunkBounds
from opd_async.plan.plan import Plan, RoleKind
from opd_async.plan.resolve import make_plan
from opd_async.run.control_bounds import SPEAKERS, ControlBounds
from opd_async.run.dispatcher import Dispatcher
from opd_async.run.ledger import Ledger
from opd_async.run.state import RunState
from opd_async.scheduling.assembly import MAX_EARLY, Assembler, Verdict
from opd_async.scheduling.further import FURTHER_IDS, MAX_FURTHER
from opd_async.scheduling.grants import Grants
from opd_async.scheduling.leases import LeaseBook, PromptOrder, admission_of
from opd_async.telemetry.exporter import RoleMetrics
from opd_async.transport import messages as m
from opd_async.transport.bounds import BOUNDS, MAX_COUNT, Range, problem, receive
from opd_async.transport.wire import ArrayOf, encode

MESSAGES = [getattr(m, name) for name in m.__all__ if dataclasses.is_dataclass(getattr(m, name))]
ROWS = 2
WORDS = {"kind": "train", "finish": "stop", "command": "Train", "role": "intake-0"}


def sane(kind: type) -> Any:
    """A message within all bounds, its arrays of two rows."""
    values: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if name not in {field.name for field in dataclasses.fields(kind)}:
            continue
        parts = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
        marks = [mark for part in parts for mark in getattr(part, "__metadata__", ()) if isinstance(mark, ArrayOf)]
        if marks:
            values[name] = np.ones((ROWS, 2) if marks[0].ndim == 2 else ROWS, marks[0].dtype)
            if "logprobs" in name:
                values[name] = -values[name]
        elif name in WORDS:
            values[name] = WORDS[name]
        else:
            plain = {int: 1, float: 0.5, str: "x", bool: True}
            origin = typing.get_origin(parts[0])
            element = plain[typing.get_args(parts[0])[-1]] if origin else None
            values[name] = {list: [element], dict: {"x": element}}.get(origin) if origin else plain[parts[0]]
    if "context" in values:
        values["context"] = np.ones(values["prompt_tokens"] + values["start"], np.int32)
    values |= dict.fromkeys({"teacher_prompt_tokens", "contrast_prompt_tokens"} & values.keys(), ROWS)
    if kind is m.TrainedSample:
        values |= {"prompt_tokens": ROWS, "response_tokens": ROWS}
    if "completed" in values:
        values["completed"] = np.array([[0, 1], [3, 4]], np.int64)
    return kind(**values)


def absurd(message: Any) -> Iterator[tuple[str, Any]]:
    """The same message with each of its fields, one at a time, as it can never be."""
    for field in dataclasses.fields(message):
        value, bound = getattr(message, field.name), BOUNDS[field.name]
        if isinstance(value, np.ndarray):
            if len(value):
                yield field.name, value[:-1]
            assert isinstance(bound, Range)
            for bad in (bound.low - 1, math.nan, math.inf, -math.inf) if value.dtype.kind == "f" else (bound.low - 1,):
                if bound.finite and not bound.low <= bad <= bound.high:
                    changed = value.copy()
                    changed.flat[-1] = bad
                    yield field.name, changed
        elif isinstance(value, str):
            yield field.name, "x" * (1 << 21)
            if field.name in WORDS and field.name != "role":
                yield field.name, "another word"
        elif isinstance(value, dict):
            yield field.name, {f"{i}": 0.5 for i in range(5000)}
        elif isinstance(value, list):
            yield field.name, ["x"] * 5000
        elif not isinstance(value, bool):
            for bad in (-(2**62), 2**62, math.nan, math.inf) if isinstance(value, float) else (-(2**62), 2**62, -1):
                if field.name != "reward" or abs(bad) > 1e30 or bad != bad:
                    yield field.name, bad


SINGLE = {
    (m.TakeShare, "advantages"),
    (m.TakeShare, "rewards"),
    *((m.EvalDone, "token_ids"), (m.Train, "teacher_logprobs")),
    *((kind, f"{whose}_prompt") for kind in (m.Lease, m.ScoredChunk) for whose in ("teacher", "contrast")),
}
"""Arrays that no other one has to agree with, though they do in other messages."""


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_field_has_bounds_and_a_sane_message_is_within(kind: type) -> None:
    assert {field.name for field in dataclasses.fields(kind)} <= set(BOUNDS)
    message = sane(kind)
    assert problem(message) is None
    assert type(receive(encode(message))) is kind


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_absurd_field_is_refused_where_it_enters(kind: type) -> None:
    message = sane(kind)
    alone = {"completed", "prompt", "prefix", "given", "staleness_counts", "further", "again_ids"}
    for name, bad in absurd(message):
        cut = isinstance(bad, np.ndarray) and len(bad) < ROWS
        if cut and (name in alone or (kind, name) in SINGLE):
            continue
        with pytest.raises((WireError, OverflowError, ValueError)):
            receive(encode(dataclasses.replace(message, **{name: bad})))
            pytest.fail(f"{kind.__name__}.{name} = {bad!r:.60} was taken")


# --- the dispatcher ---------------------------------------------------------------------------------------------------


class Fleet:
    """Of the fleet, what the dispatcher looks at."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.keys = RunKeys.draw()
        self._roles = {role.name: role for role in plan.roles}

    def role(self, name: str) -> Any:
        return self._roles[name]

    def incarnation(self, name: str) -> str | None:
        return "1"

    def say(self, line: str) -> None:
        raise AssertionError(line)


class Post:
    """A control server that has these messages to deliver, and then waits for ever."""

    def __init__(self, letters: list[tuple[str, Any]]) -> None:
        self._letters = iter(letters)
        self.done = asyncio.Event()

    async def receive(self) -> tuple[str, Any]:
        for letter in self._letters:
            return letter
        self.done.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, role: str, message: Any) -> bool:
        raise AssertionError(f"{message} was sent to {role}")


def unbelievable(plan: Plan) -> list[tuple[str, Any]]:
    """Messages that are well formed, from roles of the run or strangers, and cannot be."""
    none, ids = np.zeros(0, np.int32), np.array([3], np.int64)
    one, far = np.ones(1, np.int32), np.full(1, plan.vocab_size, np.int32)
    stats, counts = {"tokens": 1.0}, np.ones(1, np.int64)
    taken = {"taken_ids": ids, "taken_ends": one, "taken_complete": one}
    started = {"waited_s": 0.0, "stats": stats, "staleness_counts": counts, **taken}
    twice = {name: np.concatenate([value, value]) for name, value in started.items() if name.startswith("taken")}
    acks = {"sample_ids": ids, "attempts": one, "ends": one, "taken_tokens": 0, "idle": False, "hold": None}
    letters = [(role, sane(kind)) for kind in MESSAGES for role in ("nobody", "\ufffd", "rollout-7", "rank-0")]
    for kind in MESSAGES:  # roles that may not say it
        allowed = SPEAKERS.get(kind, frozenset())
        letters += [(role.name, sane(kind)) for role in plan.roles if role.kind not in allowed]
    return [
        *letters,
        ("rollout-0", m.Hello("teacher-0", "1")),
        ("rollout-0", m.Heartbeat("intake-0", {"tokens": 5.0})),
        ("rollout-0", m.Failure("learner-0", "not mine to say")),
        ("rollout-0", m.LeaseDone(0, 0, 5000, "stop")),
        ("rollout-0", m.EvalDone(sample_id=3, finish="stop", weight_version=0, token_ids=one)),
        ("rollout-0", m.EvalDone(sample_id=2**61, finish="stop", weight_version=0, token_ids=far)),
        ("intake-0", m.Acks(next_step=0, ready_tokens=1, actors=np.array([1], np.int32), **acks)),
        ("intake-0", m.Acks(next_step=99, ready_tokens=1, actors=one - 1, **acks)),
        ("intake-0", m.PartStarted(version=7, tokens=1, **taken)),
        ("intake-0", m.PartStarted(version=5, tokens=1, **{name: twice[name] for name in taken})),
        ("intake-0", m.StepStarted(version=7, **started)),
        ("intake-0", m.StepStarted(version=5, **started | twice)),
        ("intake-0", m.Reclaimed(ids, one, one, one, far)),
        *unasked(plan),
        ("intake-0", m.Frontier(5, np.array([[3, 1]], np.int64), ids[:0], none, none)),
        ("intake-0", m.Frontier(5, np.array([[0, 4], [2, 9]], np.int64), ids[:0], none, none)),
        ("intake-0", dataclasses.replace(sane(m.TrainedSample), version=99)),
        ("intake-0", dataclasses.replace(sane(m.TrainedSample), version=5, response=np.concatenate([far, one]))),
        ("intake-0", m.DrainRequest(3)),
        ("intake-0", m.Quiesced(99)),
        ("intake-0", m.NotSaved(99, "no room")),
        ("learner-0", m.LearnerReply("Train", 99, None, {})),
        ("learner-0", m.LearnerReply("SyncWeights", 3, None, {})),
    ]


LEASED, COMPLETED, TRAINED, PAUSE, RESET = 0, 1, 5, 4, 6
"""A sample that is leased and trained up to `TRAINED`, one that is trained to its end, and requests that are open."""


def unasked(plan: Plan) -> list[tuple[str, Any]]:
    """Answers to what nobody asked, and news of samples that were never leased or go back."""

    def ids(*values: int) -> np.ndarray[Any, Any]:
        return np.array(values, np.int64)

    def col(*values: int) -> np.ndarray[Any, Any]:
        return np.array(values, np.int32)

    def acks(sample_id: int, attempt: int, end: int) -> m.Acks:
        rest = {"ready_tokens": 1, "taken_tokens": 0, "idle": False, "hold": None, "actors": col(0)}
        return m.Acks(next_step=5, sample_ids=ids(sample_id), attempts=col(attempt), ends=col(end), **rest)

    def step(sample_id: int, end: int) -> m.StepStarted:
        taken = {"taken_ids": ids(sample_id), "taken_ends": col(end), "taken_complete": col(0)}
        return m.StepStarted(version=5, waited_s=0.0, stats={"tokens": 1.0}, staleness_counts=ids(1), **taken)

    longest = plan.topology.engines.student.context_tokens
    tokens = np.ones(TRAINED, np.int32)
    return [
        ("rollout-0", m.Paused(PAUSE + 1, ids(LEASED), col(0), col(TRAINED))),
        ("rollout-0", m.Paused(PAUSE, ids(77), col(0), col(TRAINED))),
        ("rollout-0", m.Paused(PAUSE, ids(LEASED), col(0), col(longest + 2))),
        ("rollout-0", m.ResetDone("rollout-0", RESET + 1)),
        ("teacher-0", m.ResetDone("teacher-0", RESET)),
        ("intake-0", m.Reclaimed(ids(COMPLETED), col(1), col(TRAINED), col(0), tokens)),
        ("intake-0", m.Reclaimed(ids(LEASED, COMPLETED), col(1, 1), col(TRAINED, 0), col(0, 1), tokens)),
        ("intake-0", m.Reclaimed(ids(LEASED), col(1), col(TRAINED - 1), col(0), tokens[1:])),
        ("intake-0", m.Reclaimed(ids(LEASED), col(2), col(TRAINED), col(0), tokens)),
        ("intake-0", acks(77, 0, 3)),
        ("intake-0", acks(LEASED, 2, 3)),
        ("intake-0", acks(LEASED, 0, longest + 2)),
        ("intake-0", step(77, 9)),
        ("intake-0", step(COMPLETED, 9)),
        ("intake-0", step(LEASED, TRAINED - 1)),
        ("intake-0", step(LEASED, longest + 2)),
    ]


def state_of(dispatcher: Dispatcher) -> bytes:
    """Everything that a message could change."""
    run, barrier, mailbox = dispatcher.state, dispatcher.barrier, dispatcher.mailbox
    ours = {name: getattr(dispatcher, name) for name in ("_up", "_incarnations")} | {
        "signs": {who: sign.work for who, sign in dispatcher.watch._live._signs.items()},
    }
    ours |= {name: getattr(run, name) for name in ("version", "engine_group", "resetting", "reclaiming")}
    roles = {name: totals.now for name, totals in dispatcher.ledger.roles.items() if name != "launcher"}
    gate = (barrier.state, barrier._owed, barrier._expected, dispatcher.leasing._admitting)
    return pickle.dumps((vars(run.book), ours, roles, gate, mailbox._unread, dispatcher.failed.done()))


async def test_the_dispatcher_believes_nothing_that_cannot_be(tmp_path: Path) -> None:
    plan = make_plan(small_topology(tmp_path))
    with zmq.asyncio.Context() as context:
        prompt = Prompt(0, np.ones(2, np.int32), "x", {})
        ledger = Ledger(plan=plan)
        mix = Mix(CompletionSet().completions, 1.0, 0, False)
        fleet: Any = Fleet(plan)
        dispatcher = Dispatcher(plan, fleet, ledger, RoleMetrics("launcher"), context, [prompt], mix)
        dispatcher.close()
        state = m.Frontier(5, np.zeros((0, 2), np.int64), np.zeros(0, np.int64), *2 * [np.zeros(0, np.int32)])
        dispatcher.state.book = book_of(plan, state)
        dispatcher.state.version = 5
        open_requests(dispatcher)
        letters = unbelievable(plan)
        before = state_of(dispatcher)
        post: Any = Post(letters)
        dispatcher.server = post
        loop = asyncio.create_task(dispatcher.receive())
        done = asyncio.create_task(post.done.wait())
        await asyncio.wait({loop, done}, return_when=asyncio.FIRST_COMPLETED)
        assert not loop.done(), loop.exception()
        loop.cancel()
        assert state_of(dispatcher) == before
        assert ledger.roles["launcher"].now["malformed_frames"] == len(letters)


def open_requests(dispatcher: Dispatcher) -> None:
    """A run in which something is asked of an actor and of the intake."""
    book = dispatcher.state.book
    assert book is not None
    for sample_id in (LEASED, COMPLETED):
        spec = book.lease("rollout-0", 5)
        assert spec is not None and spec.sample_id == sample_id
    book.trained(LEASED, TRAINED, False)
    book.trained(COMPLETED, 9, True)
    dispatcher.barrier._expected = {"rollout-0": PAUSE}
    dispatcher.state.resetting = {"rollout-0": RESET}
    dispatcher.state.reclaiming = [frozenset({LEASED})]


async def test_an_answer_is_taken_once(tmp_path: Path) -> None:
    """What was asked is believed; the same once more is refused."""
    plan = make_plan(small_topology(tmp_path))
    ids, one, end = np.array([LEASED], np.int64), np.ones(1, np.int32), np.full(1, TRAINED, np.int32)
    answers = [
        ("rollout-0", m.Paused(PAUSE, ids, 0 * one, end + 1)),
        ("rollout-0", m.ResetDone("rollout-0", RESET)),
        ("intake-0", m.Reclaimed(ids, one, end, 0 * one, np.ones(TRAINED, np.int32))),
    ]
    with zmq.asyncio.Context() as context:
        ledger, fleet = Ledger(plan=plan), Fleet(plan)
        mix = Mix(CompletionSet().completions, 1.0, 0, False)
        dispatcher = Dispatcher(plan, fleet, ledger, RoleMetrics("launcher"), context, [], mix)  # type: ignore[arg-type]
        dispatcher.close()
        empty = np.zeros(0, np.int32)
        dispatcher.state.book = book_of(plan, m.Frontier(5, np.zeros((0, 2), np.int64), ids[:0], empty, empty))
        dispatcher.state.version = 5
        open_requests(dispatcher)
        post: Any = Post([*answers, *answers])
        dispatcher.server = post
        loop = asyncio.create_task(dispatcher.receive())
        done = asyncio.create_task(post.done.wait())
        await asyncio.wait({loop, done}, return_when=asyncio.FIRST_COMPLETED)
        assert not loop.done(), loop.exception()
        loop.cancel()
        box = dispatcher.mailbox
        assert (await box.expect(("Paused", "rollout-0", PAUSE), 1.0, "")).ends.tolist() == [TRAINED + 1]
        assert await box.expect(("ResetDone", "rollout-0", RESET), 1.0, "") == answers[1][1]
        assert box._unread == {} and ledger.roles["launcher"].now["malformed_frames"] == len(answers)
        assert dispatcher.state.book.attempt_of(LEASED) == 1 and dispatcher.state.book.held_by("rollout-0") == []


class Telling(Post):
    """One that keeps what is sent."""

    def __init__(self, letters: list[tuple[str, Any]]) -> None:
        super().__init__(letters)
        self.told: list[tuple[str, Any]] = []

    async def send(self, role: str, message: Any) -> bool:
        self.told.append((role, message))
        return True


@pytest.mark.parametrize("up", [True, False])
async def test_an_episode_gets_further_samples_while_its_actor_is_there(tmp_path: Path, up: bool) -> None:
    plan = make_plan(small_topology(tmp_path))
    wanted = ("rollout-0", m.FurtherWanted(LEASED, 0))
    letters = [wanted, wanted, ("rollout-0", m.FurtherWanted(LEASED, 1)), ("rollout-0", m.FurtherWanted(77, 0))]
    letters += [("rollout-0", m.FurtherUnused(FURTHER_IDS, 0))]
    with zmq.asyncio.Context() as context:
        ledger, fleet = Ledger(plan=plan), Fleet(plan)
        mix = Mix(CompletionSet().completions, 1.0, 0, False)
        dispatcher = Dispatcher(plan, fleet, ledger, RoleMetrics("launcher"), context, [], mix)  # type: ignore[arg-type]
        dispatcher.close()
        empty = np.zeros(0, np.int32)
        state = m.Frontier(5, np.zeros((0, 2), np.int64), empty.astype(np.int64), empty, empty)
        book = dispatcher.state.book = book_of(plan, state)
        dispatcher.state.version = 5
        open_requests(dispatcher)
        dispatcher._up |= {"rollout-0"} if up else set()
        post: Any = Telling(letters)
        dispatcher.server = post
        loop = asyncio.create_task(dispatcher.receive())
        done = asyncio.create_task(post.done.wait())
        await asyncio.wait({loop, done}, return_when=asyncio.FIRST_COMPLETED)
        assert not loop.done(), loop.exception()
        loop.cancel()
        grants = Grants(fleet.keys)
        leases = [m.FurtherLease(LEASED, 0, one, grants.of(one, 0, 0)) for one in (FURTHER_IDS, FURTHER_IDS + 1) if up]
        assert post.told == [("rollout-0", lease) for lease in leases]
        assert [spec.sample_id for spec in book.held_by("rollout-0")] == [LEASED, *([FURTHER_IDS + 1] if up else [])]


def book_of(plan: Plan, frontier: m.Frontier) -> LeaseBook:
    topology = plan.topology
    order = PromptOrder(4, topology.rollout.group_size, 0, False)
    return LeaseBook(frontier, order, admission_of(topology.schedule), topology.rollout.slots)


# --- chunks -----------------------------------------------------------------------------------------------------------


def test_chunks_that_cannot_be_reach_no_assembler(tmp_path: Path) -> None:
    plan, keys = make_plan(small_topology(tmp_path)), RunKeys.draw()
    bounds, grants = ChunkBounds(plan, keys), Grants(keys)
    ids = {"token_ids": np.ones(3, np.int32), "context": np.ones(2, np.int32)}
    good = scored(1, 0, 3, grant=grants.of(1, 0, 0), teacher="teacher", weight_version=4)
    good = dataclasses.replace(good, **ids)
    assert bounds.of_scored("teacher-0", good, newest=4) is None
    assert bounds.of_scored(None, good, newest=4) is None
    vocab = plan.vocab_size
    for change in (
        {"grant": 0},
        {"sample_id": 2},
        {"attempt": 1},
        {"actor": 1},
        {"actor": MAX_COUNT},
        {"teacher_id": "rollout-0"},
        {"teacher": "another"},
        {"weight_version": 5},
        {"prompt_tokens": 64},
        {"start": 62},
        {"token_ids": np.full(3, vocab, np.int32)},
        {"context": np.full(2, vocab, np.int32)},
        {"topk_ids": np.full((3, 2), vocab, np.int32)},
        {"episode": 0},
        {"sample_id": FURTHER_IDS, "grant": grants.of(FURTHER_IDS, 0, 0)},
        {"further": np.array([FURTHER_IDS, 2])},
        {"further": np.arange(FURTHER_IDS, FURTHER_IDS + MAX_FURTHER + 1)},
    ):
        assert bounds.of_scored("teacher-0", dataclasses.replace(good, **change), newest=4), change
    further = dataclasses.replace(good, sample_id=FURTHER_IDS, grant=grants.of(FURTHER_IDS, 0, 0), episode=1)
    assert bounds.of_scored("teacher-0", further, newest=4) is None
    assert bounds.of_scored("teacher-0", dataclasses.replace(good, scored_version=4), newest=4), "not a live one"
    for sender in ("rollout-0", "teacher-7", "learner-0"):
        assert bounds.of_scored(sender, good, newest=4)
    assert ChunkBounds(plan, RunKeys.draw()).of_scored("teacher-0", good, newest=4)


def test_scores_of_live_weights_are_as_new_as_their_tokens(tmp_path: Path) -> None:
    live = ("opd.type=self", "opd.self.place=engines", "opd.self.weights=live", "models.teacher=null")
    plan = make_plan(small_topology(tmp_path, *live))
    bounds = ChunkBounds(plan, keys := RunKeys.draw())
    chunk = scored(1, 0, 3, grant=Grants(keys).of(1, 0, 0), teacher="teacher", weight_version=4)
    chunk = dataclasses.replace(chunk, token_ids=np.ones(3, np.int32), context=None)
    for version, good in ((3, False), (4, True), (5, True), (6, False), (None, False)):
        problem = bounds.of_scored("teacher-0", dataclasses.replace(chunk, scored_version=version), newest=5)
        assert (problem is None) == good, (version, problem)


def test_versions_do_not_go_back_and_are_not_older_than_a_step_may_take() -> None:
    box = Assembler()
    assert box.add(scored(1, 0, 3, context=True, weight_version=5)) is Verdict.ACCEPTED
    assert box.add(scored(1, 6, 9, weight_version=4)) is Verdict.MALFORMED
    assert box.add(scored(1, 3, 6, weight_version=4)) is Verdict.MALFORMED
    assert box.add(scored(1, 6, 9, weight_version=6)) is Verdict.EARLY
    assert box.add(scored(1, 3, 6, weight_version=7)) is Verdict.ACCEPTED  # the early one went back: it comes again
    assert box.samples[1].scored_end == 6
    assert box.add(scored(1, 6, 9, weight_version=8), oldest=9) is Verdict.MALFORMED
    assert box.add(scored(1, 0, 3, weight_version=5), oldest=9) is Verdict.DUPLICATE
    assert box.add(scored(1, 6, 9, weight_version=8), oldest=8) is Verdict.ACCEPTED


def test_what_comes_early_is_bounded() -> None:
    box = Assembler()
    assert box.add(scored(1, 0, 1, context=True)) is Verdict.ACCEPTED
    verdicts = [box.add(scored(1, start, start + 1)) for start in range(2, MAX_EARLY + 4)]
    assert verdicts.count(Verdict.EARLY) == len(box.samples[1].early) == MAX_EARLY
    assert box.add(scored(1, 1, 2)) is Verdict.ACCEPTED
    assert box.samples[1].scored_end == MAX_EARLY + 2


def test_other_intakes_than_the_first_decide_nothing(tmp_path: Path) -> None:
    plan = make_plan(small_topology(tmp_path, "intake.replicas=2", "learner.data_parallel=2"))
    bounds = ControlBounds(SimpleNamespace(plan=plan, barrier=None, state=RunState()))  # type: ignore[arg-type]
    deciding = {kind for kind, roles in SPEAKERS.items() if roles == {RoleKind.INTAKE}} - {m.TrainedSample}
    assert len(deciding) > 7
    for kind in deciding:
        assert bounds.problem("intake-1", sane(kind)) == "the first intake alone has any to send"
    assert bounds.problem("intake-1", m.Heartbeat("intake-1", {})) is None
